"""What a checkpoint holds, from its metadata alone: no tensor is read and JAX is not started."""

import base64
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from maxconv.algebra import Box
from maxconv.errors import UserError
from maxconv.report import size
from maxconv.sources import FileSource, open_source
from maxconv.targets.place import UNFINISHED_WORDS

METADATA = "_METADATA"
CACHE_BYTES = 100 << 20  # of OCDBT nodes, as Orbax caches them: every array is found through them
# What tells one of many alike: `layers.7.`, `layers_7.`; not the 0 of `wi_0`.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=layers_)\d+")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


@dataclass(frozen=True)
class Stored:
    """A tensor: `dtype` by numpy's name, `chunk` the shape that one object of storage holds.

    `spec` is the PartitionSpec it was saved with, in words; empty if none is recorded.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    chunk: tuple[int, ...] | None = None
    spec: str = ""


@dataclass(frozen=True)
class Item:
    """A tree of arrays that Orbax saved.

    Attributes:
        directory: its own, `<checkpoint>/<step>/items` in those of MaxText.
        arrays: by name, in the order of the tree.
        others: what the tree holds besides (empty dictionaries, strings): name to type.
        meshes: the meshes it was saved from, in words.
        custom: the user's metadata.
        ocdbt, zarr3: how the arrays are stored.
        store: where; nodes of the database that were read stay cached while it lives.
    """

    directory: epath.Path
    arrays: Mapping[str, Stored]
    others: Mapping[str, str]
    meshes: Sequence[str]
    custom: Mapping[str, Any]
    ocdbt: bool
    zarr3: bool
    store: ts.KvStore

    def open(self, name: str, boxes: Sequence[Box] = ()) -> ts.Future[ts.TensorStore]:
        """An array, to read these boxes from."""
        del boxes  # others may be read as well
        return ts.open({"driver": self.driver}, kvstore=self.store / f"{name}/")

    @property
    def driver(self) -> str:
        """TensorStore's, of the arrays."""
        return "zarr3" if self.zarr3 else "zarr"


def describe(path: str | epath.Path) -> str:
    """A table of a checkpoint's tensors: Hugging Face's, or Orbax' in any of its directories.

    Raises:
        UserError: if it is neither, or damaged.
    """
    path = str(path)
    if path.startswith("hf://"):  # which is asked as a source only
        with open_source(path) as source:
            return _describe_source(source)
    if items := find_items(epath.Path(path)):
        return "\n\n".join(_describe_item(open_item(item)) for item in items)
    directory = epath.Path(path)
    if directory.is_dir() and not _looks_like_hugging_face(directory):
        names = [path.name for path in directory.iterdir()]
        unfinished = [n for n in names if "orbax-checkpoint-tmp" in n or n == UNFINISHED_WORDS]
        raise UserError(
            f"{path} holds only {unfinished[0]}, a save that was not finished; save it again."
            if unfinished
            else f"{path} is no checkpoint: neither a Hugging Face directory (config.json, "
            "*.safetensors) nor one of Orbax (_METADATA); give the directory that holds them."
        )
    with open_source(path) as source:
        return _describe_source(source)


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
    path = f"{directory}/"
    files = path if "://" in path else {"driver": "file", "path": path}
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
    metadata = _load(directory / METADATA)
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
    others = {n: value["value_type"] for n, value in leaves.items() if n not in arrays}
    custom = metadata.get("custom_metadata") or {}
    for parent in (directory, directory.parent):
        if (parent / "_CHECKPOINT_METADATA").exists():
            custom |= _load(parent / "_CHECKPOINT_METADATA").get("custom_metadata") or {}
    return Item(directory, arrays, others, meshes, custom, ocdbt, zarr3, store)


def _load(file: epath.Path) -> dict[str, Any]:
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
    else:
        code, chunk = zarr["dtype"], zarr["chunks"]
    # zarr2 writes `<f4`, and the plain name of what numpy has no code for
    dtype = ts.dtype(np.dtype(code) if code[0] in "<|>" else code)
    nbytes = math.prod(shape) * dtype.numpy_dtype.itemsize
    return Stored(name, shape, dtype.name, nbytes, tuple(chunk), spec)


def _shardings(directory: epath.Path) -> tuple[dict[str, str], list[str]]:
    """The PartitionSpec of each leaf and the meshes they are of."""
    if not (directory / "_sharding").exists():
        return {}, []
    # One text serves many leaves, and is long: it lists every device.
    words: dict[str, tuple[str, str]] = {}
    specs = {}
    for key, text in _load(directory / "_sharding").items():
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


def _describe_item(item: Item) -> str:
    storage = f"{'OCDBT' if item.ocdbt else 'files'}, zarr{3 if item.zarr3 else 2}"
    step = item.directory.parent.name
    lines = [
        f"Orbax checkpoint {item.directory}",
        f"  step {step}, {storage}" if step.isdigit() else f"  {storage}",
    ]
    lines += [f"  {key}={value}" for key, value in item.custom.items()]
    lines += [f"  saved from the mesh {mesh}" for mesh in item.meshes]
    lines += [f"  {name}: {kind}, no tensor" for name, kind in item.others.items()]
    return "\n".join([*lines, "", *_table(item.arrays.values())])


def _describe_source(source: FileSource) -> str:
    named = source.config.get("architectures") or ["no architecture named"]
    sizes = [f"{key}={source.config[key]}" for key in _SIZES if key in source.config]
    files = source.files
    more = f" to {files[-1]}" if len(files) > 1 else ""
    lines = [
        f"Hugging Face checkpoint {source.root}",
        *([f"  revision {source.revision}"] if source.revision else []),
        f"  {', '.join(named)}: {', '.join(sizes)}",
        *([f"  {len(files)} files, {files[0]}{more}"] if files else []),
        *(f"  {notice}" for notice in source.notices),
    ]
    stored = [
        Stored(info.name, info.shape, info.dtype.name, info.nbytes)
        for info in source.stored.values()
    ]
    return "\n".join([*lines, "", *_table(stored)])


def _looks_like_hugging_face(directory: epath.Path) -> bool:
    names = [child.name for child in directory.iterdir()]
    return any(n == "config.json" or n.endswith((".safetensors", ".index.json")) for n in names)


def _table(tensors: Iterable[Stored]) -> list[str]:
    """One line for all tensors that differ in their numbers only, and the totals."""
    tensors = list(tensors)
    rows = []
    for name, same in fold(tensors):
        first, times = same[0], f"{len(same)} x " if len(same) > 1 else ""
        chunk = f"chunk {first.chunk}" if first.chunk is not None else ""
        nbytes = size(sum(t.nbytes for t in same))
        rows.append((name, f"{times}{first.shape}", first.dtype, nbytes, first.spec, chunk))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    elements = sum(math.prod(t.shape) for t in tensors)
    total = size(sum(t.nbytes for t in tensors))
    return [*lines, "", f"{len(tensors)} tensors, {elements:,} elements, {total}"]


def fold(tensors: Iterable[Stored]) -> list[tuple[str, list[Stored]]]:
    """Groups tensors that are alike but for the numbers in their names.

    Returns:
        A name for each group, such as `layers.{0..31}.mlp`, and its members; a group whose numbers
        are not all the combinations of a few is left as single tensors.
    """
    groups: defaultdict[tuple[object, ...], list[Stored]] = defaultdict(list)
    for t in tensors:
        alike = _NUMBER.sub("#", t.name), t.shape, t.dtype, t.chunk, t.spec
        groups[alike].append(t)
    folded = []
    for same in groups.values():
        numbers = [[int(n) for n in _NUMBER.findall(t.name)] for t in same]
        axes = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        if len(same) == 1 or math.prod(map(len, axes)) != len(same):
            folded += [(t.name, [t]) for t in same]
            continue
        texts = iter(_ranges(axis) for axis in axes)
        folded.append((_NUMBER.sub(lambda _, texts=texts: next(texts), same[0].name), same))
    return folded


def _ranges(numbers: Sequence[int]) -> str:
    """`{0..3,7}`; a single number as it is."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
