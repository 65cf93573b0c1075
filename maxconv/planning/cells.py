"""How a leaf is made: cut into cells, each with what it reads and how that is sharded.

A *cell* is the part of a leaf that one evaluation makes, such as one layer of a scanned kernel.
Where the axis along which cells follow each other is itself sharded (experts over devices), a
*step* makes one cell in each shard at once, or several: these are its lanes (`lanes`). A cell that
takes more than a budget is made in slices, in the same way.

What a cell reads is needed sharded as its output is, pulled back through the expression, so that
each device computes its part by itself. Who reads it from storage is another matter: `shares`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxconv.algebra import (
    Box,
    Expr,
    Read,
    Shape,
    clip,
    dims,
    full,
    tensors,
    trace,
    volume,
    with_axis,
)
from maxconv.planning.lanes import Offset, PlacedCell, in_lanes, placed_cells, with_neighbours
from maxconv.planning.placement import local_devices, mesh_axes, shard_nbytes, shards
from maxconv.planning.redistribution import CellRead, cell_read


@dataclass(frozen=True)
class Recipe:
    """How a cell is computed; compiled once for all cells that share it.

    Attributes:
        cell: expression over tensors named "0", "1", ...
        box: the part of it that is made, in the first lane of the first slice.
        reads: in the order of `algebra.trace(cell, box).reads`.
        lanes: the axis of the leaf that is cut into lanes, as many in each shard; or None.
        shape, dtype, sharding: of the leaf, or the slab of it, that the cell is written into.
    """

    cell: Expr
    box: Box
    reads: tuple[CellRead, ...]
    lanes: int | None
    shape: Shape
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def size(self) -> int:
        """Elements that a step makes."""
        lanes = 1 if self.lanes is None else self.reads[0].shape[0]
        return lanes * volume(self.box)

    @property
    def is_whole(self) -> bool:
        """A step makes all of the leaf: there is nothing to write it into."""
        return self.size == math.prod(self.shape)

    @cached_property
    def buffer_nbytes(self) -> int:
        """Host bytes that the reads of one step take, in the process that reads most."""
        return sum(read.buffer_nbytes for read in self.reads)

    @cached_property
    def device_nbytes(self) -> int:
        """Bytes that a device is given for one step, and what it has of them once exchanged."""
        return sum(
            read.shard_nbytes + (read.needed_nbytes if read.share else 0) for read in self.reads
        )

    @property
    def cost(self) -> int:
        """Bytes that a step is bounded by: of packed weights twice as much is made as read, of what
        is replicated many times as much."""
        return max(self.buffer_nbytes, self.device_nbytes, self.made_nbytes // 2)

    @property
    def lanes_in_shard(self) -> int:
        """Cells that a step makes in each shard, one after another on the axis of lanes."""
        if self.lanes is None:
            return 1
        return self.reads[0].shape[0] // shards(self.sharding, self.lanes)

    @cached_property
    def made_nbytes(self) -> int:
        """Bytes that a step makes in a process, on all its devices."""
        shard = shard_nbytes(self.sharding, self.shape, self.dtype)
        made = shard * self.size // max(math.prod(self.shape), 1)
        return made * local_devices(self.sharding)


@dataclass(frozen=True)
class Step:
    """One evaluation of a recipe.

    Attributes:
        offset: where in the leaf the cell goes; on the axis of lanes, where in each shard.
        sources: for each read, the box of a tensor that each lane reads.
    """

    recipe: Recipe
    offset: Offset
    sources: tuple[tuple[Read, ...], ...]

    @property
    def reading(self) -> tuple[object, ...]:
        """What is read, and how: the same of steps that can be made of one reading."""
        return self.recipe.reads, self.sources

    def reads_of(self, process: int) -> Iterator[tuple[CellRead, frozenset[Read]]]:
        """For each read of the recipe, the boxes of tensors that a process reads from storage."""
        for i, read in enumerate(self.recipe.reads):
            lanes = (lane for part in read.parts.get(process, ()) for lane in read.lanes(part))
            yield read, frozenset(self._source(i, lane) for lane in lanes)

    def filling(self, read: int, box: Box) -> Iterator[tuple[Box, Read]]:
        """What fills a box of a read's array as it is read: where in its buffer, and of which
        tensor which box."""
        for within, part in self.recipe.reads[read].pieces(box):
            yield within, self._source(read, part)

    def _source(self, read: int, box: Box) -> Read:
        """The part of a tensor that is a box of a read's array."""
        if self.recipe.lanes is None:
            (whole,), inner = self.sources[read], box
        else:
            whole, inner = self.sources[read][box[0][0]], box[1:]
        at = (lo for lo, _ in whole.box)
        return Read(
            whole.name, tuple((a + lo, a + hi) for a, (lo, hi) in zip(at, inner, strict=True))
        )


def steps(
    expr: Expr,
    dtypes: Mapping[str, np.dtype],
    dtype: np.dtype,
    to: NamedSharding,
    budget: int,
) -> list[Step]:
    """The steps that make a leaf, in order.

    Args:
        expr: the leaf.
        dtypes: of the tensors, by name.
        dtype, to: of the leaf.
        budget: bytes that a step should read at most in a process, and half of what it should make;
            cells are cut down to it.
    """
    found = []
    cells = placed_cells(expr, dtypes)

    def at_once(first: PlacedCell, axis: int, most: int) -> int:
        return _at_once(_Cell(*first.kind, expr.shape, dtype, to), axis, most, budget)

    for lanes, offset, group in with_neighbours(in_lanes(cells, expr.shape, to), to, at_once):
        made = _Cell(*group[0].kind, expr.shape, dtype, to)
        found += made.steps(lanes, offset, [cell.names for cell in group], budget)
    return found


@dataclass(frozen=True)
class _Cell:
    """A cell without its names, and the leaf that it goes into."""

    expr: Expr
    dtypes: tuple[np.dtype, ...]
    shape: Shape
    dtype: np.dtype
    to: NamedSharding

    def steps(
        self, lanes: int | None, offset: Offset, names: Sequence[tuple[str, ...]], budget: int
    ) -> Iterator[Step]:
        """One step, or as many as there are slices. `names`: of the tensors of each lane."""
        whole = full(self.expr.shape)
        in_shard = 1 if lanes is None else len(names) // shards(self.to, lanes)
        recipe = _recipe(self, whole, lanes, in_shard)
        excess = recipe.cost / budget
        if excess <= 1 or (cut := _slices(self, excess, lanes)) is None:
            yield self._step(recipe, offset, names, [whole] * len(names))
            return
        axis, n, pieces = cut
        in_shards = lanes is None and pieces > 1  # then the slices of all shards go together
        part = with_axis(whole, axis, (0, n))
        recipe = _recipe(self, part, axis if in_shards else lanes, in_shard)
        for at in range(0, self.expr.shape[axis] // pieces, n):
            starts = [s * (self.expr.shape[axis] // pieces) + at for s in range(pieces)]
            boxes = [with_axis(whole, axis, (start, start + n)) for start in starts]
            moved = (*offset[:axis], offset[axis] + at, *offset[axis + 1 :])
            if in_shards:
                yield self._step(recipe, moved, list(names) * pieces, boxes)
            else:
                yield self._step(recipe, moved, names, boxes * len(names))

    def _step(
        self,
        recipe: Recipe,
        offset: Offset,
        names: Sequence[tuple[str, ...]],
        boxes: Sequence[Box],
    ) -> Step:
        reads = [
            [Read(of[int(r.name)], r.box) for r in _reads(self.expr, box)]
            for of, box in zip(names, boxes, strict=True)
        ]
        return Step(recipe, offset, tuple(zip(*reads, strict=True)))


@cache
def _slices(cell: _Cell, excess: float, lanes: int | None) -> tuple[int, int, int] | None:
    """Along which axis to cut a cell, into slices how long, in how many shards of the axis.

    It is cut where every read is cut alike, by preference where the runs in the file stay long.
    """
    best: tuple[int, tuple[int, int, int]] | None = None
    for axis, n in enumerate(cell.expr.shape):
        pieces = shards(cell.to, axis) if n == cell.shape[axis] else 1
        if lanes is not None and (axis == lanes or pieces > 1):
            continue
        rows = n // pieces
        parts = next((p for p in range(1, rows + 1) if rows % p == 0 and p >= excess), rows)
        cuts = _cuts(cell.expr, full(cell.expr.shape), axis, pieces * parts)
        if parts > 1 and None not in cuts:
            rank = max(cut for cut in cuts if cut is not None)
            if best is None or rank < best[0]:
                best = rank, (axis, rows // parts, pieces)
    return best[1] if best else None


@cache
def _at_once(cell: _Cell, axis: int, most: int, budget: int) -> int:
    """How many cells that follow each other in a shard a step had best make: no more than it takes
    for processes to read long runs, or whole tensors."""
    best, longest = 1, 0.0
    for n in (n for n in range(1, most + 1) if most % n == 0):
        recipe = _recipe(cell, full(cell.expr.shape), axis, n)
        if recipe.cost > budget:
            break
        if (run := min((read.run / read.best_run for read in recipe.reads), default=1)) > longest:
            best, longest = n, run
        if longest >= 1:
            break
    return best


@cache
def _recipe(cell: _Cell, box: Box, lanes: int | None, in_shard: int = 1) -> Recipe:
    reads = []
    pulled = _pulled_back(cell, box, lanes)
    shapes = {tensor.name: tensor.shape for tensor in tensors(cell.expr)}
    for read, spec in pulled:
        shape, entries = dims(read.box), spec
        if lanes is not None:
            shape = (shards(cell.to, lanes) * in_shard, *shape)
            entries = [mesh_axes(cell.to, lanes) or None, *spec]
        sharding = NamedSharding(cell.to.mesh, PartitionSpec(*entries))
        dtype = cell.dtypes[int(read.name)]
        reads.append(cell_read(shape, dtype, sharding, shapes[read.name], lanes is not None))
    return Recipe(
        cell.expr,
        box,
        tuple(reads),
        lanes,
        cell.shape,
        cell.dtype,
        cell.to,
    )


def _pulled_back(cell: _Cell, box: Box, lanes: int | None) -> list[tuple[Read, list[Any]]]:
    """Each read with its sharding, one PartitionSpec entry an axis.

    An axis of the leaf passes its mesh axes on to the axis of the tensor that it cuts into equal,
    ordered pieces. Where there is none (it is cut inside a permuted atom, or another axis took its
    place) the read is replicated over those mesh axes.
    """
    reads = _reads(cell.expr, box)
    specs: list[list[Any]] = [[None] * len(read.box) for read in reads]
    for axis, (lo, hi) in enumerate(box):
        pieces = shards(cell.to, axis)
        if axis == lanes or pieces == 1:
            continue
        if hi - lo != cell.shape[axis]:
            continue
        for spec, cut in zip(specs, _cuts(cell.expr, box, axis, pieces), strict=True):
            if cut is not None and spec[cut] is None:
                spec[cut] = mesh_axes(cell.to, axis)
    return list(zip(reads, specs, strict=True))


def _cuts(expr: Expr, box: Box, axis: int, pieces: int) -> list[int | None]:
    """For each read of a box: its axis that is cut evenly, in order, when `axis` is; or None."""
    lo, hi = box[axis]
    n = (hi - lo) // pieces
    parts = [
        _reads(expr, with_axis(box, axis, (lo + i * n, lo + (i + 1) * n))) for i in range(pieces)
    ]
    return [_cut(read, i, parts) for i, read in enumerate(_reads(expr, box))]


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


@cache
def _reads(expr: Expr, box: Box) -> tuple[Read, ...]:
    return trace(expr, box).reads


def nbytes_by_process(steps: Iterable[Step], shapes: Mapping[str, Shape]) -> Counter[int]:
    """Bytes that each process reads for some steps.

    The steps of a recipe read alike but at the ends of tensors and where lanes read the same, so
    the others are counted at once: there may be 50,000 of them, and a thousand processes.
    """
    total: Counter[int] = Counter()
    alike: Counter[Recipe] = Counter()
    for step in steps:
        if all(
            len(set(lanes)) == len(lanes)
            and all(clip(s.box, shapes[s.name]) == s.box for s in lanes)
            for lanes in step.sources
        ):
            alike[step.recipe] += 1
        else:
            processes = {p for read in step.recipe.reads for p in read.parts}
            total.update({p: nbytes_read(step, shapes, p) for p in processes})
    for recipe, n in alike.items():
        for read in recipe.reads:
            total.update({p: n * nbytes for p, nbytes in read.nbytes_by_process.items()})
    return total


def nbytes_read(step: Step, shapes: Mapping[str, Shape], process: int) -> int:
    """Bytes that a process reads for a step; what lies past a tensor's end is not read."""
    total = 0
    for read, sources in step.reads_of(process):
        elements = sum(volume(clip(s.box, shapes[s.name])) for s in sources)
        total += elements * read.dtype.itemsize
    return total
