"""A source of tensors: what it holds, and how boxes of a tensor are read from it.

A box is a half-open interval per axis. Nothing here knows of files: `files.py` has the sources
whose tensors are runs of bytes in files.
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
    """A tensor as `Source.read` gives it.

    The dtype is one that JAX has without its 64-bit mode; what is stored wider is converted as it
    is read (see `narrow.py`).
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


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

    Of the `nbytes` received by `requests`, `headers` belonged to headers and other small files, and
    `between` lay between boxes that were requested together. The rest, beyond what
    `Stats.bytes_read` counts, was received more than once because requests were repeated.
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
        root: what to call it in messages.
        revision: the commit it was taken from, if known.
        config: the content of its config.json.
        tensors: by name.
        notices: sentences about what was found and left out.
        adapter: a LoRA adapter whose tensors are among these.
        stats: what was read so far.
        readers: threads that keep its storage busy when they read small tensors.
        is_shared: all processes see the same storage.
        traffic: what was transferred over the network so far.
    """

    root: str
    revision: str | None
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notices: Sequence[str]
    adapter: "Source | None" = None
    readers: int = 2  # one copies while the other waits for its storage
    is_shared: bool = False

    def __init__(self) -> None:
        self.stats = Stats()

    @abstractmethod
    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """Fills each array with its box of a tensor.

        Args:
            info: one of `tensors`.
            parts: disjoint boxes, and for each an array of its shape and of a dtype as wide as the
                tensor's, with any strides.

        Raises:
            ValueError: an array does not fit its box.
            OSError: the bytes cannot be read.
            ConversionError: the tensor holds values that its dtype here does not have.
        """

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor; KeyError when there is none of that name."""
        info = self.tensors[name]
        array = aligned_empty(info.shape, info.dtype)
        self.read(info, [(full(info.shape), array)])
        return array

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        """A box of a tensor, read as simply as can be, to check what `read` does.

        It is not counted in `stats`, where the source knows another way than `read`.
        """
        array = np.empty(dims(box), info.dtype)
        self.read(info, [(box, array)])
        return array

    def path(self, info: TensorInfo) -> Path | None:
        """Where the safetensors file of a tensor lies on this machine, if it does."""
        return None

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def allow(self, nbytes: int) -> None:
        """Bounds the bytes that all requests in flight may be about to bring."""
        return

    def held(self, ahead: int) -> int:
        """Bytes that reading holds at most beside the arrays it fills, of which `ahead` bytes are
        being filled at once."""
        return 0

    def between(self, info: TensorInfo, boxes: Sequence[Box]) -> int:
        """Upper bound of the bytes read beside the boxes of a tensor when they are read in one
        call; 0 where storage is read without gaps."""
        return 0

    def versions(self) -> dict[str, str]:
        """What tells this checkpoint from another one at the same place, each thing with its name.

        Where storage knows no better: its commit, and a digest of the names, dtypes and shapes.
        """
        headers = repr(sorted((i.name, str(i.dtype), i.shape) for i in self.tensors.values()))
        return {
            "the revision": str(self.revision),
            "the digest of the tensors": hashlib.sha256(headers.encode()).hexdigest()[:12],
        }

    def fingerprints(self) -> Mapping[str, str]:
        """What tells the content of this source from that of another copy, by file.

        Equal on two hosts whose copies are equal, whatever their paths and times. Where storage
        pins its content by version, the versions are enough and nothing is read.
        """
        return self.versions()

    @abstractmethod
    def close(self) -> None:
        """Releases what reading opened; a later read opens it again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def bit_views(info: TensorInfo, parts: Sequence[Part]) -> list[Part]:
    """The parts that are not empty, their arrays as unsigned integers of the same width.

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
