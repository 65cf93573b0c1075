"""Orbax checkpoints: their contents, from the metadata alone, and their arrays in TensorStore."""

import base64
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from maxconv.algebra import Box
from maxconv.errors import UserError

METADATA = "_METADATA"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
SHARDING = "_sharding"
CACHE_BYTES = 100 << 20  # for OCDBT nodes, as in Orbax: every array is found through them


@dataclass(frozen=True)
class Stored:
    """A stored array.

    Attributes:
        dtype: numpy's name of it.
        chunk: shape of a chunk, which is one object in storage.
        inner: shape of the parts of a chunk that are encoded separately.
        spec: the PartitionSpec it was saved with, as text; empty if none is recorded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    chunk: tuple[int, ...] | None = None
    spec: str = ""
    inner: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Item:
    """A tree of arrays that Orbax saved.

    Attributes:
        directory: of the tree; `<checkpoint>/<step>/items` in MaxText checkpoints.
        arrays: by name, in the order of the tree.
        types: Orbax' type of every entry of the tree, by name.
        meshes: the meshes it was saved from, as text.
        custom: the user's metadata.
        ocdbt, zarr3: how the arrays are stored.
        store: the key-value store of the arrays; it caches the database nodes that were read.
    """

    directory: epath.Path
    arrays: Mapping[str, Stored]
    types: Mapping[str, str]
    meshes: Sequence[str]
    custom: Mapping[str, Any]
    ocdbt: bool
    zarr3: bool
    store: ts.KvStore

    @property
    def others(self) -> dict[str, str]:
        """Entries of the tree that are not arrays (empty dictionaries, strings): name to type."""
        return {name: type for name, type in self.types.items() if name not in self.arrays}

    def open(self, name: str, boxes: Sequence[Box] = ()) -> ts.Future[ts.TensorStore]:
        """Opens an array, of which at least these boxes can be read."""
        del boxes  # here, all of it can
        return ts.open({"driver": self.driver}, kvstore=self.store / f"{name}/")

    @property
    def driver(self) -> str:
        """TensorStore's driver for the arrays."""
        return "zarr3" if self.zarr3 else "zarr"


def find_items(path: epath.Path) -> list[epath.Path]:
    """The Orbax trees at a path: itself, those of a step, or those of the last step in it."""
    if (path / METADATA).exists():
        return [path]
    children = list(path.iterdir()) if path.is_dir() else []
    if items := sorted(child for child in children if (child / METADATA).exists()):
        return items
    steps = sorted((c for c in children if c.name.isdigit()), key=lambda c: int(c.name))
    return find_items(steps[-1]) if steps else []


def open_store(directory: epath.Path, ocdbt: bool = False) -> ts.KvStore:
    """A directory, or the OCDBT database in it, as a TensorStore key-value store."""
    path = os.fspath(directory)
    # TensorStore takes no `..` in a path.
    files = f"{path}/" if "://" in path else {"driver": "file", "path": f"{os.path.abspath(path)}/"}
    if not ocdbt:
        return ts.KvStore.open(files).result()
    spec = {"driver": "ocdbt", "base": files, "cache_pool": {"total_bytes_limit": CACHE_BYTES}}
    return ts.KvStore.open(spec).result()


def open_item(directory: epath.Path) -> Item:
    """Reads the metadata of a tree.

    Raises:
        UserError: it is damaged.
    """
    try:
        return _open_item(directory)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        said = f"it has no {error}" if isinstance(error, KeyError) else reason(error)
        raise UserError(f"{directory} is damaged: {said}; save the checkpoint again.") from None


def _open_item(directory: epath.Path) -> Item:
    metadata = load_json(directory / METADATA)
    ocdbt = metadata.get("use_ocdbt", (directory / "manifest.ocdbt").exists())
    zarr3 = metadata.get("use_zarr3", False)
    leaves = {
        ".".join(str(key["key"]) for key in entry["key_metadata"]): entry["value_metadata"]
        for entry in metadata["tree_metadata"].values()
    }
    specs, meshes = _shardings(directory)
    arrays = {}
    store = open_store(directory, ocdbt)
    for name, zarr in _zarr_metadata(store, list(leaves), zarr3).items():
        arrays[name] = _stored(name, zarr, specs.get(name, ""))
    types = {name: value["value_type"] for name, value in leaves.items()}
    custom = metadata.get("custom_metadata") or {}
    for parent in (directory, directory.parent):
        if (parent / CHECKPOINT_METADATA).exists():
            custom |= load_json(parent / CHECKPOINT_METADATA).get("custom_metadata") or {}
    return Item(directory, arrays, types, meshes, custom, ocdbt, zarr3, store)


def load_json(file: epath.Path) -> dict[str, Any]:
    """Reads a JSON object from a file; ValueError if the file is anything else."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} is not a JSON object ({error})") from None


def _zarr_metadata(
    store: ts.KvStore, names: Sequence[str], zarr3: bool
) -> dict[str, dict[str, Any]]:
    """The zarr metadata of every leaf that is an array."""
    file = "zarr.json" if zarr3 else ".zarray"
    reads = {name: store.read(f"{name}/{file}") for name in names}
    found = {name: read.result() for name, read in reads.items()}
    return {n: json.loads(r.value) for n, r in found.items() if r.state == "value"}


def reason(error: BaseException) -> str:
    """The message of a TensorStore error, without its status code and source locations."""
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    return re.sub(r"^[A-Z_]+: | \[(tensorstore_spec|source locations)=.*", "", first)


def _stored(name: str, zarr: Mapping[str, Any], spec: str) -> Stored:
    shape = tuple(zarr["shape"])
    if zarr["zarr_format"] == 3:
        code, chunk = zarr["data_type"], zarr["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = {codec["name"]: codec.get("configuration", {}) for codec in zarr["codecs"]}
        inner = codecs.get("sharding_indexed", {}).get("chunk_shape", chunk)
    else:
        code, chunk = zarr["dtype"], zarr["chunks"]
        inner = chunk
    # zarr2 writes `<f4`, and the plain name of a dtype that numpy has no code for
    dtype = ts.dtype(np.dtype(code) if code[0] in "<|>" else code)
    nbytes = math.prod(shape) * dtype.numpy_dtype.itemsize
    return Stored(name, shape, dtype.name, nbytes, tuple(chunk), spec, tuple(inner))


def _shardings(directory: epath.Path) -> tuple[dict[str, str], list[str]]:
    """The PartitionSpec of each leaf, and all meshes."""
    if not (directory / SHARDING).exists():
        return {}, []
    # Many leaves have the same text, which is long: it lists every device.
    parsed: dict[str, tuple[str, str]] = {}
    specs = {}
    for key, text in load_json(directory / SHARDING).items():
        if text not in parsed:
            parsed[text] = _sharding_texts(json.loads(text))
        specs[base64.b64decode(key).decode()] = parsed[text][0]
    return specs, sorted({mesh for _, mesh in parsed.values() if mesh})


def _sharding_texts(sharding: Mapping[str, Any]) -> tuple[str, str]:
    if sharding["sharding_type"] != "NamedSharding":
        return sharding["sharding_type"], ""
    spec = [tuple(axes) if isinstance(axes, list) else axes for axes in sharding["partition_spec"]]
    while spec and spec[-1] is None:
        spec.pop()
    sizes = [
        f"{axis}={size}"
        for axis, size in zip(sharding["axis_names"], sharding["shape"], strict=True)
        if size > 1
    ]
    return f"P({', '.join(map(repr, spec))})", " ".join(sizes) or "1 device"
