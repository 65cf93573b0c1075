"""The interface of a source: which tensors it has, and how boxes of a tensor are read.

A box is a half-open interval per axis. Nothing here depends on files: `files.py` has the sources
whose tensors are byte ranges of files.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike

from maxconv.algebra.boxes import Box, dims, full

Part = tuple[Box, np.ndarray]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as `Source.read` returns it.

    The dtype is one that JAX supports without its 64-bit mode; wider stored dtypes are converted
    while reading (see `narrow.py`).

    `chunk`: shape of the parts that can only be read as a whole, if it is stored in such.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    @property
    def chunk_nbytes(self) -> int:
        """Bytes that are read at least for any part of it."""
        return math.prod(self.chunk or ()) * self.dtype.itemsize


@dataclass(slots=True)
class Stats:
    """What was read so far: bytes of tensors in the dtypes of `Source.tensors`, without headers."""

    bytes_read: int = 0
    requests: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, bytes_read: int, requests: int) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.requests += requests


class Traffic(NamedTuple):
    """What was transferred over the network.

    Of the `nbytes` received by `requests`, `headers` are headers and other small files, and
    `between` are gaps between boxes that were requested together. Anything beyond these and
    `Stats.bytes_read` was received again by retries.
    """

    requests: int = 0
    nbytes: int = 0
    between: int = 0
    headers: int = 0

    def plus(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(sum, zip(self, other, strict=True)))


class Source(ABC):
    """A checkpoint whose tensors can be read in boxes, by several threads at once.

    Attributes:
        root: its path or URL, for messages.
        revision: the commit it was taken from, if known.
        config: the contents of its config.json.
        contradictory: names of entries that it has several times, with different values.
        tensors: by name.
        notices: sentences about what was found and what is ignored.
        adapter: a LoRA adapter whose tensors are among `tensors`.
        stats: what was read so far.
        readers: number of threads that keep its storage busy when they read small tensors.
        is_shared: whether all processes see the same storage.
        traffic: what was transferred over the network so far.
    """

    root: str
    revision: str | None
    config: dict[str, Any]
    contradictory: Sequence[str] = ()
    tensors: Mapping[str, TensorInfo]
    notices: Sequence[str]
    adapter: "Source | None" = None
    readers: int = 2  # one copies while the other waits for storage
    is_shared: bool = False

    def __init__(self) -> None:
        self.stats = Stats()

    @abstractmethod
    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """Fills each array with its box of a tensor.

        Args:
            info: one of `tensors`.
            parts: disjoint boxes, each with an array of the same shape, of a dtype with the same
                item size as the tensor's, and any strides.

        Raises:
            ValueError: an array does not fit its box.
            OSError: the bytes cannot be read.
            ConversionError: the tensor has values that do not fit in the dtype it is read as.
        """

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor; KeyError if there is none of that name."""
        info = self.tensors[name]
        array = aligned_empty(info.shape, info.dtype)
        self.read(info, [(full(info.shape), array)])
        return array

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        """A box of a tensor, read in the simplest possible way, as a check of `read`.

        Sources that have another way than `read` do not count it in `stats`.
        """
        array = np.empty(dims(box), info.dtype)
        self.read(info, [(box, array)])
        return array

    def path(self, info: TensorInfo) -> Path | None:
        """The local safetensors file of a tensor, if there is one."""
        return None

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def allow(self, nbytes: int) -> None:
        """Bounds the total bytes of all requests in flight."""
        return

    def held(self, ahead: int) -> int:
        """Upper bound of the bytes that reading holds in addition to the arrays it fills, when
        `ahead` bytes of arrays are being filled at once."""
        return 0

    def between(self, info: TensorInfo, boxes: Sequence[Box]) -> int:
        """Upper bound of the bytes read in addition to some boxes of a tensor when they are read in
        one call; 0 if the storage never reads through gaps."""
        return 0

    def versions(self) -> dict[str, str]:
        """What distinguishes this checkpoint from another one at the same path, by description.

        By default its commit, and a digest of the names, dtypes and shapes of its tensors.
        """
        headers = repr(sorted((i.name, str(i.dtype), i.shape) for i in self.tensors.values()))
        return {
            "the revision": str(self.revision),
            "the digest of the tensors": hashlib.sha256(headers.encode()).hexdigest()[:12],
        }

    def fingerprints(self) -> Mapping[str, str]:
        """Fingerprints of the contents, by file.

        Equal on two hosts with equal copies, whatever their paths and modification times. Where
        storage pins contents by version, the versions are used and nothing is read.
        """
        return self.versions()

    @abstractmethod
    def close(self) -> None:
        """Closes files and connections; a later read opens them again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def bit_views(info: TensorInfo, parts: Sequence[Part]) -> list[Part]:
    """The parts that are not empty, with their arrays viewed as unsigned integers of equal width.

    Raises:
        ValueError: an array does not fit its box.
    """
    itemsize = info.dtype.itemsize
    for box, array in parts:
        if array.shape != dims(box) or array.dtype.itemsize != itemsize:
            raise ValueError(f"{array.dtype}{array.shape} does not fit box {box} of {info.name!r}")
    return [(box, array.view(f"u{itemsize}")) for box, array in parts if array.size]


def aligned_empty(shape: Sequence[int], dtype: DTypeLike, zero: bool = False) -> np.ndarray:
    """A C-contiguous array at a multiple of 64 bytes, which JAX on a CPU uses without a copy."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = (np.zeros if zero else np.empty)(nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)
