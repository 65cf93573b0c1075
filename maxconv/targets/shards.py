"""The files of a Hugging Face checkpoint: safetensors files, whose layout is known beforehand.

Every process writes whole files of its own, in any order of their bytes.
"""

import heapq
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from etils import epath

from maxconv.algebra import Box, full, slices, with_axis
from maxconv.algebra.storage import runs
from maxconv.execution.timeline import span
from maxconv.sources.index import ADAPTER as CONFIG
from maxconv.sources.index import INDEX
from maxconv.sources.safetensors import DTYPES

ALONE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"  # as PEFT finds it
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the data of a file, as the safetensors library has it
_WEIGHTS = re.compile(r"(adapter_)?model(-\d{5}-of-\d{5})?\.safetensors")
_SHORT = 16 << 10  # bytes: shorter runs are written through a mapping of the file


@dataclass(frozen=True)
class Tensor:
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """A file of a checkpoint, and the process that writes it."""

    name: str
    process: int
    tensors: tuple[Tensor, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the data."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for tensor, start in zip(self.tensors, self._starts, strict=True):
            entries[tensor.name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": tensor.shape,
                "data_offsets": [start, start + tensor.nbytes],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        return len(text).to_bytes(8, "little") + text

    @cached_property
    def _starts(self) -> list[int]:
        ends = [0]
        for tensor in self.tensors:
            ends.append(ends[-1] + tensor.nbytes)
        return ends[:-1]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)

    def places(self) -> Iterator[tuple[Tensor, int]]:
        """Each tensor with its offset in the file."""
        for tensor, start in zip(self.tensors, self._starts, strict=True):
            yield tensor, len(self.header) + start


def by_size(tensors: Iterable[Tensor], most: int, owners: Mapping[str, int]) -> list[File]:
    """Files of at most `most` bytes of data, as far as tensors allow.

    Args:
        tensors: in any order.
        most: bytes.
        owners: the process that writes each tensor, by name.
    """
    groups: list[tuple[int, list[Tensor]]] = []
    held = 0
    for tensor in sorted(tensors, key=lambda t: (owners[t.name], _natural(t.name))):
        owner = owners[tensor.name]
        if not groups or owner != groups[-1][0] or held + tensor.nbytes > most:
            groups.append((owner, []))
            held = 0
        groups[-1][1].append(tensor)
        held += tensor.nbytes
    if len(groups) == 1:
        return [File(ALONE, groups[0][0], tuple(groups[0][1]))]
    names = (f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1))
    return [File(n, p, tuple(of)) for n, (p, of) in zip(names, groups, strict=True)]


def as_stored(
    tensors: Iterable[Tensor], where: Mapping[str, tuple[str, int]], processes: Sequence[int]
) -> list[File]:
    """The files that a checkpoint has; each process has an equal share of them.

    Args:
        tensors: to write.
        where: the file of each, and a number by which those of a file are ordered.
        processes: that write.
    """
    together: dict[str, list[Tensor]] = {}
    for tensor in sorted(tensors, key=lambda tensor: where[tensor.name]):
        together.setdefault(where[tensor.name][0], []).append(tensor)
    found = [File(name, 0, tuple(of)) for name, of in together.items()]
    shares = zip(processes, _dealt(found, len(processes)), strict=True)
    dealt = (replace(file, process=process) for process, share in shares for file in share)
    return sorted(dealt, key=lambda file: file.name)


def _dealt(files: Sequence[File], n: int) -> list[list[File]]:
    """Files in `n` shares of about as many bytes, each in the order given.

    The largest are dealt first, each to the share that has least.
    """
    shares = [list[int]() for _ in range(n)]
    least = [(0, i) for i in range(n)]  # a heap: the first has least
    for at in sorted(range(len(files)), key=lambda i: -files[i].nbytes):
        nbytes, i = least[0]
        shares[i].append(at)
        heapq.heapreplace(least, (nbytes + files[at].nbytes, i))
    return [[files[at] for at in sorted(share)] for share in shares]


def index(written: Sequence[File]) -> dict[str, Any]:
    """The contents of model.safetensors.index.json."""
    every = [tensor for file in written for tensor in file.tensors]
    where = {tensor.name: file.name for file in written for tensor in file.tensors}
    return {
        "metadata": {
            "total_parameters": sum(math.prod(tensor.shape) for tensor in every),
            "total_size": sum(tensor.nbytes for tensor in every),
        },
        "weight_map": dict(sorted(where.items())),
    }


def index_file(written: Sequence[File]) -> dict[str, bytes]:
    """The index by its name; nothing if there is one file of weights with its usual name."""
    if [file.name for file in written] in ([ALONE], [ADAPTER]):
        return {}
    return {INDEX: (json.dumps(index(written), indent=2) + "\n").encode()}


def _natural(name: str) -> list[Any]:
    """A key that sorts layer 10 after layer 2, and the embedding before layers."""
    parts = re.split(r"(\d+)", name)
    key = [int(part) if part.isdecimal() else part for part in parts]
    return ["embed" not in name, len(parts) == 1, *key]


@dataclass(frozen=True)
class Contents:
    """A checkpoint to write.

    Attributes:
        files: of weights, written by all processes.
        others: the contents of the small files beside them, such as config.json.
    """

    files: Sequence[File]
    others: Mapping[str, bytes]

    @property
    def key(self) -> str:
        """The file without which nothing loads the checkpoint, and so the last to appear."""
        return next(iter(index_file(self.files)), self.files[0].name)

    @property
    def small(self) -> dict[str, bytes]:
        """The contents of all files but those of weights."""
        return {**self.others, **index_file(self.files)}

    @property
    def config(self) -> str:
        """The file that describes the checkpoint."""
        return next(name for name in (CONFIG, "config.json") if name in self.others)

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    def of(self, process: int) -> list[File]:
        """The files of weights that a process writes."""
        return [file for file in self.files if file.process == process]

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset((*(file.name for file in self.files), *self.small))

    def replaces(self, name: str) -> bool:
        """Whether a file that is there must go, or be replaced, for this checkpoint."""
        return name in self.names or is_weights(name)


def is_weights(name: str) -> bool:
    """Whether transformers takes a file of this name for weights, or for their index."""
    return name == INDEX or _WEIGHTS.fullmatch(name) is not None


class Writer:
    """Writes boxes of tensors, in any order, into the files of this process.

    Args:
        directory: of the files.
        mine: the files.
        keep: whether to keep what an earlier attempt wrote into them.
        complete: called with each file once all its bytes are written, by the thread that wrote
            the last; the file is closed then.
    """

    def __init__(
        self,
        directory: Path,
        mine: Iterable[File],
        keep: bool = False,
        complete: Callable[[File], object] | None = None,
    ):
        self._directory, self._lock, self._complete = directory, Lock(), complete
        self._places: dict[str, tuple[File, Tensor, int]] = {}
        self._open: dict[str, int] = {}
        self._left: dict[str, int] = {}  # bytes of each file to be written
        directory.mkdir(parents=True, exist_ok=True)
        for file in mine:
            self._places |= {t.name: (file, t, at) for t, at in file.places()}
            flags = os.O_RDWR | os.O_CREAT | (0 if keep else os.O_TRUNC)
            opened = os.open(directory / file.name, flags, 0o644)
            self._open[file.name] = opened
            self._left[file.name] = file.nbytes - len(file.header)
            os.posix_fallocate(opened, 0, file.nbytes)
            os.pwrite(opened, file.header, 0)

    def has(self, name: str) -> bool:
        """Whether a tensor is in a file of this process."""
        return name in self._places

    def write(self, name: str, box: Box, data: np.ndarray) -> int:
        """Writes a box of a tensor, of which no byte was written before; returns its bytes."""
        file, tensor, start = self._places[name]
        data = np.ascontiguousarray(data.astype(tensor.dtype, copy=False))
        with span("write", name, data.nbytes):
            self._put(self._open[file.name], tensor, start, box, data)
        if self._complete is not None and self._is_last(file, data.nbytes):
            os.close(self._open.pop(file.name))
            self._complete(file)
        return data.nbytes

    def _put(self, opened: int, tensor: Tensor, start: int, box: Box, data: np.ndarray) -> None:
        offsets, nbytes = runs(tensor.shape, box, tensor.dtype.itemsize)
        raw = data.reshape(-1).view(np.uint8).data
        if nbytes >= _SHORT or len(offsets) == 1:
            for i, offset in enumerate(offsets.tolist()):
                _pwrite(opened, raw[i * nbytes : (i + 1) * nbytes], start + offset)
            return
        (lo, hi), *_ = box
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        with _mapped(opened, start + lo * row, (hi - lo) * row) as memory:
            rows = np.ndarray((hi - lo, *tensor.shape[1:]), tensor.dtype, memory)
            rows[slices(box, with_axis(full(tensor.shape), 0, (lo, hi)))] = data
            del rows

    def _is_last(self, file: File, nbytes: int) -> bool:
        with self._lock:
            self._left[file.name] -= nbytes
            return not self._left[file.name]

    def sync(self) -> None:
        """Makes durable what was written so far."""
        with ThreadPoolExecutor(8) as pool:
            for _ in pool.map(os.fsync, self._open.values()):
                pass

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


def _pwrite(file: int, data: memoryview, offset: int) -> None:
    while data:  # one call writes 2 GiB at most
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


@contextmanager
def _mapped(file: int, offset: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes of a file as memory."""
    before = offset % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file, before + nbytes, offset=offset - before) as mapped:
        with memoryview(mapped) as memory, memory[before:] as wanted:
            yield wanted


def weights(directory: Path | epath.Path) -> list[str]:
    """The files of a directory that hold weights as transformers reads them."""
    names = (path.name for path in directory.glob("*.safetensors")) if directory.is_dir() else ()
    return sorted(name for name in names if _WEIGHTS.fullmatch(name))
