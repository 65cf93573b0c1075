"""A source of tensors: what it holds, and how boxes of a tensor are read from it.

A box is a half-open interval per axis. Everything here is about which bytes to read, and is the
same for every kind of storage; a subclass lists the tensors and fetches runs of bytes.
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import DTypeLike

from maxconv.algebra.boxes import Box, dims, full, intersect, slices
from maxconv.sources.safetensors import TensorInfo

Part = tuple[Box, np.ndarray]


@dataclass(slots=True)
class Stats:
    """What was read so far; tensor data only, not headers."""

    bytes_read: int = 0
    requests: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def add(self, bytes_read: int, requests: int) -> None:
        with self._lock:
            self.bytes_read += bytes_read
            self.requests += requests


class Traffic(NamedTuple):
    """What came over the network: requests, bytes that came, and what they were beside tensors.

    `between` are bytes that lay between parts asked for together, `headers` those of headers and
    of small files; the rest, beyond the tensors', came of what had to be asked again.
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
        block: bytes that one request brings at most when they must be copied to their places.
        readers: threads that it takes to keep its storage busy, when they read small tensors.
        is_shared: all processes see the same files.
        traffic: what came over the network so far.
    """

    root: str
    revision: str | None
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notices: Sequence[str]
    adapter: "Source | None" = None
    # Measured on a page cache: the copy still finds the block in the CPU's cache, while more
    # requests of less bytes cost more.
    block: int = 4 << 20
    readers: int = 2  # one copies while the other waits for its storage
    is_shared: bool = False

    def __init__(self) -> None:
        self.stats = Stats()

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """Fills each array with its box of a tensor.

        Reads every byte of the boxes once, and no other byte.

        Args:
            info: one of `tensors`.
            parts: disjoint boxes, and for each an array of its shape and of a dtype as wide as the
                tensor's, with any strides. C-contiguous arrays spare a copy, if their box is not
                one of several that interleave in the file.

        Raises:
            ValueError: if an array does not fit its box.
            OSError: if the bytes cannot be read.
        """
        itemsize = info.dtype.itemsize
        views: list[Part] = []
        for box, array in parts:
            if array.shape != dims(box) or array.dtype.itemsize != itemsize:
                raise ValueError(
                    f"{array.dtype}{array.shape} does not fit box {box} of {info.name!r}"
                )
            if array.size:
                views.append((box, array.view(f"u{itemsize}")))
        scratch = np.empty(0, np.uint8)
        for outer, inner in self._groups(info, views):
            (_, array), *others = inner
            if not others and array.flags.c_contiguous:
                self._fill(info, outer, array)
                continue
            for box in blocks(outer, itemsize, self.block):
                shape = dims(box)
                nbytes = math.prod(shape) * itemsize
                if scratch.nbytes < nbytes:
                    scratch = aligned_empty((nbytes,), np.uint8)
                block = scratch[:nbytes].view(f"u{itemsize}").reshape(shape)
                self._fill(info, box, block)
                _scatter(box, block, inner)

    def tensor(self, name: str) -> np.ndarray:
        """A whole tensor in its own dtype; KeyError when there is none of that name."""
        info = self.tensors[name]
        array = aligned_empty(info.shape, info.dtype)
        self.read(info, [(full(info.shape), array)])
        return array

    def at(self, info: TensorInfo, offsets: np.ndarray, nbytes: int) -> np.ndarray:
        """The elements in runs of `nbytes` bytes, at ascending `offsets` from the tensor's start.

        Not counted in `stats`: this is how a box is read by those who check what `read` does.
        """
        found = np.empty(len(offsets) * nbytes, np.uint8)
        self._fetch(info, (offsets + info.offset).tolist(), nbytes, found.data)
        return found.view(info.dtype)

    def path(self, info: TensorInfo) -> Path | None:
        """Where the safetensors file of a tensor lies on this machine, if it does."""
        return None

    @property
    def traffic(self) -> Traffic:
        return Traffic()

    def allow(self, nbytes: int) -> None:
        """Bounds the bytes that all requests under way are about to bring together."""
        return

    def held(self, ahead: int) -> int:
        """Bytes that reading holds at most beside the arrays it fills, of which `ahead` bytes are
        being filled at once: each reader copies out of blocks."""
        return min(self.readers * self.block, ahead)

    def between(self, info: TensorInfo, boxes: Sequence[Box]) -> int:
        """Bytes that come along at most when boxes of a tensor are read in one call."""
        return 0

    def _groups(
        self, info: TensorInfo, parts: Sequence[Part]
    ) -> Iterator[tuple[Box, Sequence[Part]]]:
        """Boxes to read one after the other, each with the parts that tile it."""
        together: list[Part] = []
        for part in parts:
            box, array = part
            offsets, nbytes = runs(info.shape, box, info.dtype.itemsize)
            # A long run needs no neighbours to be read well, and no copy if it is alone.
            if len(offsets) == 1 and nbytes >= self.block and array.flags.c_contiguous:
                yield box, [part]
            else:
                together.append(part)
        for outer in coalesce([box for box, _ in together]):
            yield outer, [part for part in together if intersect(outer, part[0]) is not None]

    def _fill(self, info: TensorInfo, box: Box, array: np.ndarray) -> None:
        """Reads a box straight into a C-contiguous array."""
        offsets, nbytes = runs(info.shape, box, info.dtype.itemsize)
        buffer = array.reshape(-1).view(np.uint8).data
        self._fetch(info, (offsets + info.offset).tolist(), nbytes, buffer)
        self.stats.add(len(buffer), len(offsets))

    @abstractmethod
    def _fetch(
        self, info: TensorInfo, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        """Fills `buffer` with the runs of `nbytes` bytes at `offsets` of the tensor's file.

        Raises:
            OSError: naming the file and the tensor.
        """

    def versions(self) -> dict[str, str]:
        """What tells this checkpoint from another one at the same place, each thing with its name.

        Where storage knows no better: its commit, and what the headers say.
        """
        headers = repr(sorted(self.tensors.items()))
        return {
            "the revision": str(self.revision),
            "the digest of the tensors": hashlib.sha256(headers.encode()).hexdigest()[:12],
        }

    @abstractmethod
    def close(self) -> None:
        """Releases what reading opened; a later read opens it again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def runs(shape: Sequence[int], box: Box, itemsize: int) -> tuple[np.ndarray, int]:
    """The contiguous runs of bytes that make up a box of a C-order tensor.

    Returns:
        The offset of each run from the tensor's start, ascending, int64[runs]; and the bytes in
        each of them, which is the same for all.
    """
    extents = dims(box)
    if 0 in extents:
        return np.empty(0, np.int64), 0
    # Up to and including the last axis that the box does not span, a step leaves the run.
    split = max((axis for axis, n in enumerate(shape) if extents[axis] < n), default=0)
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    steps = (np.arange(n) * stride for n, stride in zip(extents[:split], strides, strict=False))
    offsets = reduce(np.add.outer, steps, np.array(first, np.int64)).reshape(-1)
    return offsets, math.prod(extents[split:]) * itemsize


def coalesce(boxes: Iterable[Box]) -> list[Box]:
    """Disjoint boxes joined along the axes where they meet face to face, in the order of storage.

    A grid of boxes, such as the shards of an array, becomes one box.
    """
    boxes = list(boxes)
    for axis in reversed(range(len(boxes[0]) if boxes else 0)):
        joined: dict[tuple[Box, int], Box] = {}  # by the other axes, and the end along this one
        for box in sorted(boxes, key=itemgetter(axis)):
            others = box[:axis] + box[axis + 1 :]
            start, stop = box[axis]
            before = joined.pop((others, start), None)
            start = before[axis][0] if before else start
            joined[others, stop] = (*box[:axis], (start, stop), *box[axis + 1 :])
        boxes = list(joined.values())
    return sorted(boxes)


def blocks(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """Splits a box, along its leading axes, into boxes of at most `limit` bytes (or 1 item)."""
    extents = dims(box)
    axis = next((axis for axis, n in enumerate(extents) if n > 1), None)
    if axis is None or math.prod(extents) * itemsize <= limit:
        yield box
        return
    start, stop = box[axis]
    rows = max(1, limit // (math.prod(extents[axis + 1 :]) * itemsize))
    for row in range(start, stop, rows):
        part = (*box[:axis], (row, min(row + rows, stop)), *box[axis + 1 :])
        yield from blocks(part, itemsize, limit)


def aligned_empty(shape: Sequence[int], dtype: DTypeLike, zero: bool = False) -> np.ndarray:
    """A C-contiguous array at a multiple of 64 bytes, which JAX on a CPU takes over uncopied."""
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    memory = (np.zeros if zero else np.empty)(nbytes + 63, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(dtype).reshape(shape)


def _scatter(box: Box, block: np.ndarray, parts: Iterable[Part]) -> None:
    """Copies the block, which is a box of a tensor, to the parts it meets."""
    for target, array in parts:
        if (common := intersect(box, target)) is not None:
            array[slices(common, target)] = block[slices(common, box)]
