"""Orbax checkpoints: what one holds, from its metadata alone, and its arrays in TensorStore."""

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
CACHE_BYTES = 100 << 20  # of OCDBT nodes, as Orbax caches them: every array is found through them


@dataclass(frozen=True)
class Stored:
    """A tensor: `dtype` by numpy's name, `chunk` the shape that one object of storage holds.

    `inner` is the shape that is encoded by itself, of which a chunk has one or several. `spec` is
    the PartitionSpec it was saved with, in words; empty if none is recorded.
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
        directory: its own, `<checkpoint>/<step>/items` in those of MaxText.
        arrays: by name, in the order of the tree.
        types: of all that the tree holds, by name, as Orbax calls them.
        meshes: the meshes it was saved from, in words.
        custom: the user's metadata.
        ocdbt, zarr3: how the arrays are stored.
        store: where; nodes of the database that were read stay cached while it lives.
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
        """What the tree holds beside arrays (empty dictionaries, strings): name to type."""
        return {name: type for name, type in self.types.items() if name not in self.arrays}

    def open(self, name: str, boxes: Sequence[Box] = ()) -> ts.Future[ts.TensorStore]:
        """An array, to read these boxes from."""
        del boxes  # others may be read as well
        return ts.open({"driver": self.driver}, kvstore=self.store / f"{name}/")

    @property
    def driver(self) -> str:
        """TensorStore's, of the arrays."""
        return "zarr3" if self.zarr3 else "zarr"


def find_items(path: epath.Path) -> list[epath.Path]:
    """The Orbax trees at a path: itself, those of a step, or of the last step in it."""
    if (path / METADATA).exists():
        return [path]
    children = list(path.iterdir()) if path.is_dir() else []
    if items := sorted(child for child in children if (child / METADATA).exists()):
        return items
    steps = sorted((c for c in children if c.name.isdigit()), key=lambda c: int(c.name))
    return find_items(steps[-1]) if steps else []


def open_store(directory: epath.Path, ocdbt: bool = False) -> ts.KvStore:
    """A directory, or the OCDBT database in it, as TensorStore sees it."""
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
        UserError: naming what is damaged.
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
    """A JSON object from a file; ValueError when that is something else."""
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file.name} is not a JSON object ({error})") from None


def _zarr_metadata(
    store: ts.KvStore, names: Sequence[str], zarr3: bool
) -> dict[str, dict[str, Any]]:
    """The zarr metadata of every leaf that has any."""
    file = "zarr.json" if zarr3 else ".zarray"
    reads = {name: store.read(f"{name}/{file}") for name in names}
    found = {name: read.result() for name, read in reads.items()}
    return {n: json.loads(r.value) for n, r in found.items() if r.state == "value"}


def reason(error: BaseException) -> str:
    """What an error of TensorStore says, without where in its sources and in ours."""
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
    # zarr2 writes `<f4`, and the plain name of what numpy has no code for
    dtype = ts.dtype(np.dtype(code) if code[0] in "<|>" else code)
    nbytes = math.prod(shape) * dtype.numpy_dtype.itemsize
    return Stored(name, shape, dtype.name, nbytes, tuple(chunk), spec, tuple(inner))


def _shardings(directory: epath.Path) -> tuple[dict[str, str], list[str]]:
    """The PartitionSpec of each leaf and the meshes they are of."""
    if not (directory / SHARDING).exists():
        return {}, []
    # One text serves many leaves, and is long: it lists every device.
    words: dict[str, tuple[str, str]] = {}
    specs = {}
    for key, text in load_json(directory / SHARDING).items():
        if text not in words:
            words[text] = _sharding_words(json.loads(text))
        specs[base64.b64decode(key).decode()] = words[text][0]
    return specs, sorted({mesh for _, mesh in words.values() if mesh})


def _sharding_words(sharding: Mapping[str, Any]) -> tuple[str, str]:
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
