"""Which process reads which part of an array, and how it gets to the devices that need it.

No byte is read twice. The inputs of a cell are needed in some sharding. If the processes need
different parts that are long runs in the file, each reads its own. Otherwise (replicas, columns)
each device gets an equal share of the rows, and the compiled cell redistributes them over the
interconnect: with an all-to-all over each mesh axis that shards another axis than the rows, and an
all-gather over those with replicas. No chip ever holds more than the part that it needs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxconv.algebra import Box, Interval, Shape, dims, full, volume, with_axis
from maxconv.algebra.storage import coalesce
from maxconv.planning.placement import (
    boxes_by_process,
    crossing,
    mesh_axes,
    shard_nbytes,
    shards,
)
from maxconv.planning.share import Share

LONG = 1 << 20  # bytes: runs of this length are read directly rather than redistributed
RUN = 8 << 20  # bytes: longer runs are not read any faster


@dataclass(frozen=True)
class CellRead:
    """One read of a recipe, as an array over the mesh: (lanes, *box) with lanes, else (*box,).

    Attributes:
        shape, dtype: of the array.
        sharding: the one in which it is needed.
        of: shape of the tensor of which it, or each of its lanes, is a box.
        has_lanes: whether its first axis is that of the lanes.
        share: how it is divided for reading, if not by `sharding`.
    """

    shape: Shape
    dtype: np.dtype
    sharding: NamedSharding
    of: Shape
    has_lanes: bool
    share: Share | None = None

    @property
    def as_read(self) -> tuple[Shape, NamedSharding]:
        """Shape and sharding of the array as it comes from storage."""
        if self.share is None:
            return self.shape, self.sharding
        return self.share.shape(self.shape), self.share.sharding

    def pieces(self, box: Box) -> Iterator[tuple[Box, Box]]:
        """How to fill a box of the array as it is read, lane by lane: pairs of a box in its
        `buffer` and a box of the array."""
        for row, part in [(0, box)] if self.share is None else self.share.needed(box):
            extents = dims(part)
            if not self.has_lanes:
                yield full(extents), part
                continue
            for k, lane in enumerate(self.lanes(part)):
                if self.share is not None and self.share.inner:
                    within = with_axis(full(extents[1:]), 0, (row, row + extents[1]))
                    row += extents[1]
                else:
                    within = ((k, k + 1), *full(extents[1:]))
                yield within, lane

    def lanes(self, part: Box) -> Iterator[Box]:
        """Splits a box of the array into lanes, each of which is a box of one tensor."""
        if not self.has_lanes:
            yield part
            return
        for lane in range(*part[0]):
            yield (lane, lane + 1), *part[1:]

    def buffer(self, box: Box) -> Shape:
        """The shape of the buffer for a box of the array as it is read; same rank as the array."""
        axis = len(box) if self.share is None else self.share.axis
        return (*dims(box)[:axis], *dims(box)[axis + 1 :])

    def local(self, x: jax.Array) -> jax.Array:
        """The array in the sharding in which it is needed; for use in a jitted function."""
        return x if self.share is None else self.share.exchanged(x, self.sharding)

    @property
    def way(self) -> str:
        """How it gets from storage to the devices, as text: direct, or by which collectives."""
        if self.share is None:
            return "direct"
        moves = "+".join(name for name, _ in self.share.moves)
        copies = "+".join(self.share.copies)
        return ", ".join(
            f"{what} {axes}"
            for what, axes in (("all-to-all", moves), ("all-gather", copies))
            if axes
        )

    @property
    def shard_nbytes(self) -> int:
        """Bytes per device as it is read."""
        shape, sharding = self.as_read
        return shard_nbytes(sharding, shape, self.dtype)

    @property
    def needed_nbytes(self) -> int:
        """Bytes per device in the sharding in which it is needed."""
        return shard_nbytes(self.sharding, self.shape, self.dtype)

    @cached_property
    def parts(self) -> Mapping[int, frozenset[Box]]:
        """The parts of the array that each process reads."""
        shape, sharding = self.as_read
        held = boxes_by_process(sharding, shape)
        if self.share is None:
            return held
        return {
            p: frozenset(b for box in of for _, b in self.share.needed(box))
            for p, of in held.items()
        }

    @cached_property
    def buffer_nbytes(self) -> int:
        """Size of the host buffers, in bytes, in the process that reads most."""
        shape, sharding = self.as_read
        return self.shard_nbytes * max(map(len, boxes_by_process(sharding, shape).values()))

    @property
    def best_run(self) -> int:
        """Run length in bytes beyond which reading gets no faster."""
        return min(RUN, math.prod(self.of) * self.dtype.itemsize)

    @cached_property
    def run(self) -> float:
        """Average length in bytes of the runs that a process reads from files."""
        by_lanes: dict[Interval | None, list[Box]] = {}
        for part in filter(volume, next(iter(self.parts.values()))):  # the others' are alike
            lanes, box = (part[0], part[1:]) if self.has_lanes else (None, part)
            by_lanes.setdefault(lanes, []).append(box)
        elements = runs = 0
        for lanes, boxes in by_lanes.items():
            n = 1 if lanes is None else lanes[1] - lanes[0]
            for box in coalesce(boxes):
                elements += n * volume(box)
                runs += n * volume(box) // _run_length(self.of, dims(box))
        return elements * self.dtype.itemsize / runs if runs else 0

    @cached_property
    def nbytes_by_process(self) -> Mapping[int, int]:
        """Bytes that each process reads."""
        itemsize = self.dtype.itemsize
        return {p: sum(map(volume, boxes)) * itemsize for p, boxes in self.parts.items()}


def cell_read(
    shape: Shape,
    dtype: np.dtype,
    sharding: NamedSharding,
    of: Shape,
    lanes: bool,
    chunks: "Chunks | None" = None,
) -> CellRead:
    """Chooses how to read an array: each byte once over all processes, in runs as long as possible.

    Of a tensor in chunks, each chunk is read by one process.

    Args:
        shape: of the array.
        dtype: of the array.
        sharding: the one in which it is needed.
        of: shape of the tensor of which it, or each of its lanes, is a box.
        lanes: whether its first axis is that of the lanes.
        chunks: how the tensor is stored, if in chunks.
    """
    direct = CellRead(shape, dtype, sharding, of, lanes)
    if len(direct.parts) == 1:
        return direct
    if chunks is not None and not lanes:
        share = None if chunks.are_whole(direct) else chunks.shared(shape, sharding)
        return replace(direct, share=share)
    if (share := _even(shape, sharding, lanes)) is None:
        return direct
    shared = replace(direct, share=share)
    once = sum(direct.nbytes_by_process.values()) == math.prod(shape) * dtype.itemsize
    even = len(set(direct.nbytes_by_process.values())) == 1
    return direct if once and even and direct.run >= min(LONG, shared.run) else shared


@dataclass(frozen=True)
class Chunks:
    """How a tensor is stored in chunks: the shape of one, and where in it the read box begins."""

    shape: Shape
    start: Shape

    def are_whole(self, read: CellRead) -> bool:
        """Whether processes read what no other does, cut between chunks only."""
        parts = [part for of in read.parts.values() for part in coalesce(of)]
        cuts = (
            (at + end) % n == 0
            for part in parts
            for interval, extent, at, n in zip(
                part, read.shape, self.start, self.shape, strict=True
            )
            for end in interval
            if 0 < end < extent
        )
        return sum(map(volume, parts)) == math.prod(read.shape) and all(cuts)

    def shared(self, shape: Shape, to: NamedSharding) -> Share | None:
        """Shares of whole chunks for the processes, as even as they can be; None if there are none.

        Only what lies with other processes is exchanged.
        """
        across = crossing(to)
        names = [mesh_axes(to, axis) for axis in range(len(shape))]
        stay = [self._staying(axis, shape, to, across) for axis in range(len(shape))]
        axes = [axis for axis, of in enumerate(names) if of == stay[axis]]
        found = [self._along(axis, shape, to, names, stay) for axis in axes]
        return min(found, key=lambda s: s.rows * s.shares / s.block, default=None)

    def _staying(
        self, axis: int, shape: Shape, to: NamedSharding, across: Sequence[str]
    ) -> tuple[str, ...]:
        """The mesh axes of an axis over which what is read can be sharded as it is needed: those
        of a process, and those of several that cut between chunks."""
        left, stay = shape[axis], list[str]()
        for name in mesh_axes(to, axis):
            left //= to.mesh.shape[name]
            is_whole = left % self.shape[axis] == 0 and self.start[axis] % self.shape[axis] == 0
            if name in across and not is_whole:
                break
            stay.append(name)
        return tuple(stay)

    def _along(
        self,
        axis: int,
        shape: Shape,
        to: NamedSharding,
        names: Sequence[tuple[str, ...]],
        stay: Sequence[tuple[str, ...]],
    ) -> Share:
        sizes = to.mesh.shape
        block = shape[axis] // math.prod(sizes[name] for name in names[axis])
        n = self.shape[axis]
        is_cut = self.start[axis] % n or (block % n and block < shape[axis])
        unit = block if is_cut else n
        moves = tuple((name, a) for a, of in enumerate(names) for name in of if name not in stay[a])
        copies = tuple(name for name in crossing(to) if not any(name in cut for cut in names))
        order = (*copies, *(name for name, _ in reversed(moves)))
        shares = math.prod(sizes[name] for name in order)
        units = -(-block // unit)
        rows = min(block, -(-units // shares) * unit)
        entries = [of or None for of in stay]
        spec = PartitionSpec(
            *entries[:axis], names[axis] or None, order or None, *entries[axis + 1 :]
        )
        sharding = NamedSharding(to.mesh, spec)
        return Share(axis, 0, block, shares, rows, unit, moves, copies, sharding)


def _even(shape: Shape, to: NamedSharding, lanes: bool) -> Share | None:
    """Equal shares of an array, along the first axis that is long enough for all devices."""
    names = [mesh_axes(to, axis) for axis in range(len(shape))]
    found: list[Share] = []
    if lanes and shape[0] > shards(to, 0):  # several in each shard
        if len(shape) > 1 and not names[1]:
            flat = (shape[0] * shape[1], *shape[2:])
            found.append(_share(flat, to, [names[0], *names[2:]], 0, shape[1]))
        else:
            found.append(_share(shape, to, names, 0))
    found += [_share(shape, to, names, axis) for axis in range(int(lanes), len(shape))]
    long = (share for share in found if share.block >= share.shares)
    fullest = min(found, key=lambda s: s.rows * s.shares / s.block, default=None)
    return next(long, fullest)


def _share(
    shape: Shape, to: NamedSharding, names: Sequence[tuple[str, ...]], axis: int, inner: int = 0
) -> Share:
    """Equal shares along an axis. `names`: the mesh axes that shard each axis."""
    sizes = {name: n for name, n in to.mesh.shape.items() if n > 1}
    copies = tuple(name for name in sizes if not any(name in cut for cut in names))
    moves = tuple((name, a) for a in range(axis + 1, len(shape)) for name in names[a])
    block = shape[axis] // math.prod(sizes[name] for name in names[axis])
    shares = math.prod(sizes[name] for name in (*copies, *(name for name, _ in moves)))
    # What is exchanged first is divided last: axes that stay, replicas, then the moves in reverse.
    order = (*names[axis], *copies, *(name for name, _ in reversed(moves)))
    blocks, cut = order[: len(names[axis])], order[len(names[axis]) :]
    before = (n or None for n in names[:axis])
    sharding = NamedSharding(to.mesh, PartitionSpec(*before, blocks or None, cut or None))
    return Share(axis, inner, block, shares, -(-block // shares), 1, moves, copies, sharding)


def _run_length(of: Shape, extents: Shape) -> int:
    """Number of contiguous elements in a box of a tensor."""
    cut = max((axis for axis, n in enumerate(of) if extents[axis] < n), default=0)
    return math.prod(extents[cut:])
