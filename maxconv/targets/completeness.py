"""Checks that a saved checkpoint is complete: every leaf, and every byte that the index points to.

The data of the leaves is not read.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import tensorstore as ts
from etils import epath

from maxconv.errors import UserError
from maxconv.sources.ocdbt import values
from maxconv.sources.orbax import Item, Stored, open_item, reason

_FEW = 5  # problems that are reported
_METADATA = (".zarray", "zarr.json")


def problems(items: epath.PathLike, leaves: Iterable[str]) -> list[str]:
    """A sentence for everything that is missing in a tree of arrays saved by Orbax.

    Args:
        items: its directory.
        leaves: names of the arrays that it must have.
    """
    items = epath.Path(items)
    try:
        item = open_item(items)
        found = [*_missing(item, leaves)]
        found += _lost(items) if item.ocdbt else _cut(item)
    except UserError as error:
        return list(error.problems)
    except (OSError, ValueError) as error:
        return [f"{items} cannot be read: {reason(error)}."]
    more = [f"{items} has {len(found) - _FEW} more faults."] if len(found) > _FEW else []
    return found[:_FEW] + more


def _missing(item: Item, leaves: Iterable[str]) -> Iterator[str]:
    stored = chunks(item.store)
    for name in dict.fromkeys((*leaves, "step", *item.arrays)):  # MaxText's state has a step
        if (array := item.arrays.get(name)) is None:
            yield f"{item.directory} lacks {name}."
        elif (missing := _count(array.shape, array.chunk or ()) - stored.get(name, 0)) > 0:
            yield f"{item.directory} lacks {missing} of the chunks of {name}."


def _lost(directory: epath.Path) -> list[str]:
    return [
        f"{directory / file} {fault}." for file, fault in dict(broken(directory).values()).items()
    ]


def _cut(item: Item) -> Iterator[str]:
    """Truncated chunks, for storage with one file per chunk."""
    least = {name: _chunk_nbytes(item, array) for name, array in item.arrays.items()}
    for key in map(bytes.decode, item.store.list().result()):
        name, _, rest = key.partition("/")
        if name in least and rest not in _METADATA:
            nbytes = (item.directory / key).stat().length
            if nbytes < least[name]:
                yield f"{item.directory / key} is cut off after {nbytes} bytes."


def _chunk_nbytes(item: Item, array: Stored) -> int:
    """The stored size of a chunk in bytes; a lower bound if it is compressed."""
    file = "zarr.json" if item.zarr3 else ".zarray"
    zarr = json.loads(item.store.read(f"{array.name}/{file}").result().value)
    codecs, chunk, index = zarr.get("codecs", ()), array.chunk or (), 0
    if [codec["name"] for codec in codecs] == ["sharding_indexed"]:
        about = codecs[0]["configuration"]
        codecs = about["codecs"]
        index = 16 * _count(chunk, about["chunk_shape"])  # zarr 3: an offset and a length for each
    if zarr.get("compressor") is not None or any(codec["name"] != "bytes" for codec in codecs):
        return index + 1
    return index + math.prod(chunk) * ts.dtype(array.dtype).numpy_dtype.itemsize


@dataclass(frozen=True)
class Leaf:
    """How many of an array's chunks a store has; `chunk`: their shape, None without metadata."""

    chunks: int
    total: int
    chunk: tuple[int, ...] | None


def leaves_in(directory: epath.Path, store: ts.KvStore) -> dict[str, Leaf]:
    """The arrays of an OCDBT database that have lost no value, by name.

    Raises:
        OSError, ValueError: there is no database, or its index is damaged.
    """
    lost = {key.partition("/")[0] for key in broken(directory)}
    found: dict[str, Leaf] = {}
    for name, number in chunks(store).items():
        if name not in lost:
            found[name] = _leaf(number, *_metadata(store, name))
    return found


def broken(directory: epath.Path) -> dict[str, tuple[str, str]]:
    """The keys of an OCDBT database whose values are lost, each with the file that should contain
    it and a phrase about what is wrong with that file."""

    @cache
    def length(file: str) -> int | None:
        path = directory / file
        return path.stat().length if path.exists() else None

    found: dict[str, tuple[str, str]] = {}
    for key, file, _, stop in values(directory):
        if (there := length(file)) is None:
            found[key] = file, "is missing"
        elif there < stop:
            found[key] = file, f"is cut off after {there} bytes"
    return found


def chunks(store: ts.KvStore) -> dict[str, int]:
    """Number of chunks of each array in a store."""
    found: dict[str, int] = {}
    for key in store.list().result():
        name, _, rest = key.decode().partition("/")
        found[name] = found.get(name, 0) + (bool(rest) and rest not in _METADATA)
    return found


def _metadata(store: ts.KvStore, name: str) -> tuple[Any, Any]:
    """The shape of an array and of its chunks; None, None if it has no metadata."""
    for file in _METADATA:
        read = store.read(f"{name}/{file}").result()
        if read.state == "value":
            zarr: Mapping[str, Any] = json.loads(read.value)
            grid = zarr.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape")
            return zarr["shape"], zarr.get("chunks", grid)
    return None, None


def _leaf(number: int, shape: Any, chunk: Any) -> Leaf:
    if shape is None or chunk is None:
        return Leaf(number, 0, None)
    return Leaf(number, _count(shape, chunk), tuple(chunk))


def _count(shape: Iterable[int], chunk: Iterable[int]) -> int:
    """Number of chunks of an array; all of them are stored, as Orbax also writes zeros."""
    return math.prod(-(-n // c) for n, c in zip(shape, chunk, strict=True))
