"""Who reads what of an array, so that no byte is read twice, and how it gets where it is needed.

What a cell reads is needed in some sharding. Where the processes need different parts of it that
lie well in the file, each reads its own. Else (replicas, columns) each device is given an even
share of the rows, and the compiled cell exchanges them over the interconnect: an all-to-all over
each mesh axis that cuts another axis than the rows, an all-gather over those that have replicas.
No chip ever holds more than the part that it needs.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from maxconv.algebra import Box, Interval, Shape, dims, full, volume, with_axis
from maxconv.algebra.storage import coalesce
from maxconv.planning.placement import boxes_by_process, mesh_axes, shard_nbytes, shards

LONG = 1 << 20  # bytes in a row that are worth more than what an exchange costs
RUN = 8 << 20  # bytes in a row: longer runs of a file are not read any better


@dataclass(frozen=True)
class Share:
    """An array cut into even shares along one axis, its rows.

    Where the rows are sharded, each of these blocks is cut by itself. A share may have one row less
    than another; as it is read it ends in zeros then.

    Attributes:
        axis: of the rows.
        inner: rows that a lane has, where those of all lanes are the rows: then the array is cut as
            if it were (lanes * inner, ...). Else 0.
        block: rows in a block.
        shares: of a block.
        rows: of the longest share.
        moves: mesh axes whose all-to-all brings what the array has on another axis, in order; and
            that axis.
        copies: mesh axes over which the array is replicated.
        sharding: of the array as it is read, (..., blocks, shares * rows, ...).
    """

    axis: int
    inner: int
    block: int
    shares: int
    rows: int
    moves: tuple[tuple[str, int], ...]
    copies: tuple[str, ...]
    sharding: NamedSharding

    def shape(self, needed: Shape) -> Shape:
        """Of the array as it is read."""
        if self.inner:
            needed = (needed[0] * self.inner, *needed[2:])
        blocks, rows = needed[self.axis] // self.block, self.shares * self.rows
        return (*needed[: self.axis], blocks, rows, *needed[self.axis + 1 :])

    def needed(self, box: Box) -> Iterator[tuple[int, Box]]:
        """What lies in a share, a box of the array as it is read: boxes of the array, and of the
        share the row where each begins."""
        (block, _), (lo, _) = box[self.axis : self.axis + 2]
        first, end = (block * self.block + at for at in self._rows(lo // self.rows))
        rest = box[self.axis + 2 :]
        if not self.inner:
            yield 0, (*box[: self.axis], (first, end), *rest)
            return
        at = first
        while at < end:
            lane, row = divmod(at, self.inner)
            lanes = 0 if row else (end - at) // self.inner
            rows = lanes * self.inner or min(self.inner - row, end - at)
            yield (
                at - first,
                ((lane, lane + max(lanes, 1)), (row, row + rows // max(lanes, 1)), *rest),
            )
            at += rows

    def _rows(self, share: int) -> Interval:
        """Those of a block that a share has."""
        first, end = (i * self.block // self.shares for i in (share, share + 1))
        return first, end

    def exchanged(self, x: jax.Array, to: NamedSharding) -> jax.Array:
        """The array in its own sharding, `to`, from its shares; for use in a jitted function."""

        def on_device(x: jax.Array) -> jax.Array:
            x = lax.squeeze(x, [self.axis])
            for name, axis in self.moves:
                x = lax.all_to_all(x, name, axis, self.axis, tiled=True)
            if self.copies:
                x = lax.all_gather(x, self.copies, axis=self.axis, tiled=True)
            x = self._without_gaps(x)
            return x.reshape(-1, self.inner, *x.shape[1:]) if self.inner else x

        on_mesh = jax.shard_map(
            on_device,
            mesh=to.mesh,
            in_specs=self.sharding.spec,
            out_specs=to.spec,
            check_vma=False,  # what is gathered is the same on all, which it cannot tell
        )
        # Else XLA would exchange it in the tiles that the next op likes, mostly padding.
        return lax.optimization_barrier(on_mesh(x))

    def _without_gaps(self, x: jax.Array) -> jax.Array:
        """The rows of a block, of shares one after another."""
        if self.block == self.shares * self.rows:
            return x
        at = (self.rows * i + np.arange(len(range(*self._rows(i)))) for i in range(self.shares))
        index = (*[slice(None)] * self.axis, np.concatenate([*at]))
        return x.at[index].get(
            mode="promise_in_bounds", unique_indices=True, indices_are_sorted=True
        )


@dataclass(frozen=True)
class CellRead:
    """One read of a recipe, as an array over the mesh: (lanes, *box) with lanes, else (*box,).

    Attributes:
        shape, dtype: of the array.
        sharding: that it is needed in.
        of: shape of the tensor that it, or each of its lanes, is a box of.
        has_lanes: its first axis is that of the lanes.
        share: how it is read, if not in that sharding.
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
        """What fills a box of the array as it is read, lane by lane: where in its `buffer`,
        and which box of the array."""
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
        """A box of the array lane by lane: each of one tensor."""
        if not self.has_lanes:
            yield part
            return
        for lane in range(*part[0]):
            yield (lane, lane + 1), *part[1:]

    def buffer(self, box: Box) -> Shape:
        """The shape, of as many axes as the array has, of a box of it as it is read."""
        axis = len(box) if self.share is None else self.share.axis
        return (*dims(box)[:axis], *dims(box)[axis + 1 :])

    def local(self, x: jax.Array) -> jax.Array:
        """The array where it is needed; for use in a jitted function."""
        return x if self.share is None else self.share.exchanged(x, self.sharding)

    @property
    def way(self) -> str:
        """How it comes from storage to the devices, in words."""
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
        """Bytes that a device is given."""
        shape, sharding = self.as_read
        return shard_nbytes(sharding, shape, self.dtype)

    @property
    def needed_nbytes(self) -> int:
        """Bytes that a device computes with."""
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
        """Bytes that the process that reads most has it in."""
        shape, sharding = self.as_read
        return self.shard_nbytes * max(map(len, boxes_by_process(sharding, shape).values()))

    @property
    def best_run(self) -> int:
        """Bytes of runs that reading gains nothing from being longer than."""
        return min(RUN, math.prod(self.of) * self.dtype.itemsize)

    @cached_property
    def run(self) -> float:
        """Bytes of the runs in the files that a process reads for itself, on average."""
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
    shape: Shape, dtype: np.dtype, sharding: NamedSharding, of: Shape, lanes: bool
) -> CellRead:
    """A read that takes each byte once over all processes, in the longest runs there are.

    Args:
        shape: of the array.
        dtype: of the array.
        sharding: in which it is needed.
        of: shape of the tensor that it, or each of its lanes, is a box of.
        lanes: its first axis is that of the lanes.
    """
    direct = CellRead(shape, dtype, sharding, of, lanes)
    if len(direct.parts) == 1:
        return direct
    if (share := _even(shape, sharding, lanes)) is None:
        return direct
    shared = replace(direct, share=share)
    once = sum(direct.nbytes_by_process.values()) == math.prod(shape) * dtype.itemsize
    even = len(set(direct.nbytes_by_process.values())) == 1
    return direct if once and even and direct.run >= min(LONG, shared.run) else shared


def _even(shape: Shape, to: NamedSharding, lanes: bool) -> Share | None:
    """Even shares of an array, of the first axis that is long enough for all devices."""
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
    """Even shares along an axis. `names`: the mesh axes that cut each axis."""
    sizes = {name: n for name, n in to.mesh.shape.items() if n > 1}
    copies = tuple(name for name in sizes if not any(name in cut for cut in names))
    moves = tuple((name, a) for a in range(axis + 1, len(shape)) for name in names[a])
    block = shape[axis] // math.prod(sizes[name] for name in names[axis])
    shares = math.prod(sizes[name] for name in (*copies, *(name for name, _ in moves)))
    # What is exchanged first is cut last: axes that stay, replicas, then the moves backwards.
    order = (*names[axis], *copies, *(name for name, _ in reversed(moves)))
    blocks, cut = order[: len(names[axis])], order[len(names[axis]) :]
    before = (n or None for n in names[:axis])
    sharding = NamedSharding(to.mesh, PartitionSpec(*before, blocks or None, cut or None))
    return Share(axis, inner, block, shares, -(-block // shares), moves, copies, sharding)


def _run_length(of: Shape, extents: Shape) -> int:
    """Elements that lie side by side in a box of a tensor."""
    cut = max((axis for axis, n in enumerate(of) if extents[axis] < n), default=0)
    return math.prod(extents[cut:])
