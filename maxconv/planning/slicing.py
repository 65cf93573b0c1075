"""Cuts cells that are too large into slices, so that each tensor is read evenly, in long runs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding

from maxconv.algebra import Box, Expr, Read, Shape, full, trace, with_axis
from maxconv.planning.lanes import Stored
from maxconv.planning.placement import crossing, shards
from maxconv.planning.remembered import remembered


@dataclass(frozen=True)
class Cell:
    """A cell without tensor names, and the leaf that it belongs to.

    Along the axes `apart`, only one place is made at once.
    """

    expr: Expr
    stored: tuple[Stored, ...]
    shape: Shape
    dtype: np.dtype
    to: NamedSharding
    apart: tuple[int, ...] = ()


_TRIED = 3  # numbers of slices of an axis, where the best one is not even


class Cut(NamedTuple):
    """An axis of a cell that is sliced: the length of a slice, and the number of its shards."""

    axis: int
    n: int
    pieces: int

    def starts(self, shape: Shape) -> range:
        """Of the slices, within a shard."""
        return range(0, shape[self.axis] // self.pieces, self.n)

    def in_shards(self, box: Box, shape: Shape) -> Iterator[Box]:
        """The box of each shard for that of the first."""
        lo, hi = box[self.axis]
        for at in range(0, shape[self.axis], shape[self.axis] // self.pieces):
            yield with_axis(box, self.axis, (at + lo, at + hi))


@remembered
def slices_of(cell: Cell, excess: float, lanes: int | None) -> tuple[Cut, ...]:
    """How to slice a cell that is `excess` times too large.

    Only axes along which every read is cut evenly are used; preferably one that keeps runs in the
    file long. Tensors in chunks are cut along several, between the chunks as long as that helps.
    """
    cuts = {axis: Cut(axis, 1, 1) for axis in cell.apart if cell.expr.shape[axis] > 1}
    excess /= math.prod(cell.expr.shape[axis] for axis in cuts)
    in_chunks = any(stored.chunk for stored in cell.stored)
    ways = (True, False) if in_chunks else (False,)
    if in_chunks and crossing(cell.to):
        ways = (True,)  # one process keeps a chunk for the next step, but does not read for others
    for whole_chunks in ways:
        while excess > 1:
            possible = [
                found
                for axis in range(len(cell.expr.shape))
                if (found := _cut_along(cell, axis, cuts, excess, lanes, whole_chunks))
            ]
            if not possible:
                break
            _, cut, parts = min(possible)
            excess /= parts
            cuts[cut.axis] = cut
            if not in_chunks:
                return (cut,)
    return tuple(cuts.values())


def _cut_along(
    cell: Cell,
    axis: int,
    cuts: Mapping[int, Cut],
    excess: float,
    lanes: int | None,
    whole_chunks: bool,
) -> tuple[int, Cut, int] | None:
    """A further cut of an axis: its rank, the cut, and how many times more slices that makes."""
    in_chunks = any(stored.chunk for stored in cell.stored)
    n = cell.expr.shape[axis]
    pieces = shards(cell.to, axis) if n == cell.shape[axis] else 1
    is_used = any(cut.pieces > 1 and cut.axis != axis for cut in cuts.values())
    if pieces > 1 and (lanes is not None or is_used):
        return None
    if axis == lanes:
        return None
    now = cuts[axis].n if axis in cuts else n // pieces  # the length of a slice so far
    divisors = [p for p in range(2, now + 1) if now % p == 0]
    enough = [p for p in divisors if p >= excess] or divisors[-1:]
    fewer = [p for p in reversed(divisors) if p < excess]
    if whole_chunks:
        most = _most_chunks(cell) // (n // now)
        tried = [parts for parts in (*enough, *fewer) if parts <= most]
    else:
        tried = [*enough[:_TRIED], *fewer[:_TRIED]] if in_chunks else enough[:1]
    for parts in tried:
        read_cuts = even_cuts(cell.expr, full(cell.expr.shape), axis, n // now * parts)
        if None in read_cuts:
            continue
        if whole_chunks and not _are_whole(cell, read_cuts, n // now * parts):
            continue
        along = max((cut for cut in read_cuts if cut is not None), default=0)
        return axis if whole_chunks else along, Cut(axis, now // parts, pieces), parts
    return None


def _most_chunks(cell: Cell) -> int:
    """The largest number of chunks along an axis of what a cell reads."""
    counts = [1]
    for read in reads_of(cell.expr, full(cell.expr.shape)):
        if (chunk := cell.stored[int(read.name)].chunk) is not None:
            counts += (-(-hi // n) for (_, hi), n in zip(read.box, chunk, strict=True) if n)
    return max(counts)


def _are_whole(cell: Cell, cuts: Sequence[int | None], parts: int) -> bool:
    """Whether each read, cut into so many parts, is cut between chunks."""
    for read, cut in zip(reads_of(cell.expr, full(cell.expr.shape)), cuts, strict=True):
        chunk = cell.stored[int(read.name)].chunk
        if chunk is not None and cut is not None:
            lo, hi = read.box[cut]
            if lo % chunk[cut] or (hi - lo) // parts % chunk[cut]:
                return False
    return True


def even_cuts(expr: Expr, box: Box, axis: int, pieces: int) -> list[int | None]:
    """For each read of a box: its axis that is divided evenly, in order, if `axis` is; or None."""
    lo, hi = box[axis]
    n = (hi - lo) // pieces
    parts = [
        reads_of(expr, with_axis(box, axis, (lo + i * n, lo + (i + 1) * n))) for i in range(pieces)
    ]
    return [_cut(read, i, parts) for i, read in enumerate(reads_of(expr, box))]


def _cut(read: Read, i: int, parts: Sequence[Sequence[Read]]) -> int | None:
    if any(len(reads) <= i or reads[i].name != read.name for reads in parts):
        return None
    boxes = [reads[i].box for reads in parts]
    changed = {a for box in boxes for a, interval in enumerate(box) if interval != read.box[a]}
    if len(changed) != 1:
        return None
    (axis,) = changed
    lo, hi = read.box[axis]
    n, left = divmod(hi - lo, len(parts))
    even = [(lo + k * n, lo + (k + 1) * n) for k in range(len(parts))]
    return axis if not left and [box[axis] for box in boxes] == even else None


@remembered
def reads_of(expr: Expr, box: Box) -> tuple[Read, ...]:
    return trace(expr, box).reads
