"""Splits a leaf into cells, and determines what each reads and how its inputs are sharded.

A *cell* is the part of a leaf that one evaluation makes, such as one layer of a scanned kernel.
If the axis along which cells are stacked is itself sharded (experts over devices), a *step* makes
one cell in each shard at once, or several: these are its lanes (`lanes.py`). A cell that exceeds
the budget is made in slices, in the same way.

The inputs of a cell are sharded like its output, pulled back through the expression, so that each
device can compute its own part. Which process reads them from storage is decided separately, in
`redistribution.py`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from maxconv.algebra import (
    Apply,
    Box,
    Expr,
    Fit,
    Read,
    Shape,
    Tensor,
    clip,
    dims,
    full,
    tensors,
    volume,
    with_axis,
)
from maxconv.planning.lanes import (
    Offset,
    PlacedCell,
    Stored,
    in_lanes,
    placed_cells,
    with_neighbours,
)
from maxconv.planning.placement import local_devices, mesh_axes, shard_nbytes, shards
from maxconv.planning.redistribution import CellRead, Chunks, cell_read
from maxconv.planning.remembered import remembered
from maxconv.planning.slicing import Cell, even_cuts, reads_of, slices_of


@dataclass(frozen=True)
class Recipe:
    """How a cell is computed; compiled once for all cells that share it.

    Attributes:
        cell: expression over tensors named "0", "1", ...
        box: the part of it that is computed, in the first lane of the first slice.
        reads: its inputs, in the order of `algebra.trace(cell, box).reads`.
        lanes: the axis of the leaf that is divided into lanes, equally many per shard; or None.
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
        """Number of elements that a step makes, over all devices."""
        lanes = 1 if self.lanes is None else self.reads[0].shape[0]
        return lanes * volume(self.box)

    @property
    def is_whole(self) -> bool:
        """Whether one step makes the whole leaf, so that it is not written into a buffer."""
        return self.size == math.prod(self.shape)

    @cached_property
    def is_read(self) -> bool:
        """Whether what a step reads is already what it makes, so that there is no program."""
        cell = self.cell
        if isinstance(cell, Apply) and isinstance(cell.op, Fit):
            cell = cell.x  # what is past its end is read as zeros
        if not (isinstance(cell, Tensor) and self.is_whole):
            return False
        (read,) = self.reads
        is_alike = (read.shape, read.dtype) == (self.shape, self.dtype) and read.share is None
        return is_alike and read.sharding.is_equivalent_to(self.sharding, len(self.shape))

    @cached_property
    def buffer_nbytes(self) -> int:
        """Host memory for the reads of one step, in bytes, in the process that reads most."""
        return sum(read.buffer_nbytes for read in self.reads)

    @cached_property
    def device_nbytes(self) -> int:
        """Device memory for the inputs of one step, in bytes, before and after the exchange."""
        return sum(
            read.shard_nbytes + (read.needed_nbytes if read.share else 0) for read in self.reads
        )

    @property
    def cost(self) -> int:
        """Memory cost of a step in bytes: the largest of host reads, device reads, half its output.

        Half, because packed weights are twice as large once they are decoded.
        """
        return max(self.buffer_nbytes, self.device_nbytes, self.made_nbytes // 2)

    @property
    def lanes_in_shard(self) -> int:
        """Number of cells that a step makes in each shard, adjacent on the axis of lanes."""
        if self.lanes is None:
            return 1
        return self.reads[0].shape[0] // shards(self.sharding, self.lanes)

    @cached_property
    def made_nbytes(self) -> int:
        """Bytes that a step makes on all devices of a process."""
        shard = shard_nbytes(self.sharding, self.shape, self.dtype)
        made = shard * self.size // max(math.prod(self.shape), 1)
        return made * local_devices(self.sharding)


@dataclass(frozen=True)
class Step:
    """One evaluation of a recipe.

    Attributes:
        offset: of the cell in the leaf; on the axis of lanes, within each shard.
        sources: for each read, the box of a tensor for each lane.
    """

    recipe: Recipe
    offset: Offset
    sources: tuple[tuple[Read, ...], ...]

    @property
    def reading(self) -> tuple[object, ...]:
        """What is read, and how; steps for which this is equal can share one read."""
        return self.recipe.reads, self.sources

    def reads_of(self, process: int) -> Iterator[tuple[CellRead, frozenset[Read]]]:
        """For each read of the recipe, the boxes of tensors that a process reads from storage."""
        for i, read in enumerate(self.recipe.reads):
            lanes = (lane for part in read.parts.get(process, ()) for lane in read.lanes(part))
            yield read, frozenset(self._source(i, lane) for lane in lanes)

    def filling(self, read: int, box: Box) -> Iterator[tuple[Box, Read]]:
        """How to fill a box of a read's array: pairs of a box in its buffer and one of a tensor."""
        for within, part in self.recipe.reads[read].pieces(box):
            yield within, self._source(read, part)

    def _source(self, read: int, box: Box) -> Read:
        """The box of a tensor that corresponds to a box of a read's array."""
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
    stored: Mapping[str, Stored],
    dtype: np.dtype,
    to: NamedSharding,
    budget: int,
    apart: tuple[int, ...] = (),
) -> list[Step]:
    """The steps that make a leaf, in order.

    Args:
        expr: the leaf.
        stored: how the tensors are stored, by name.
        dtype, to: dtype and sharding of the leaf.
        budget: maximum `Recipe.cost` of a step, in bytes; larger cells are made in slices.
        apart: axes along which a step makes one place.
    """
    found = []
    cells = placed_cells(expr, stored)

    def at_once(first: PlacedCell, axis: int, most: int) -> int:
        return _at_once(Cell(*first.kind, expr.shape, dtype, to, apart), axis, most, budget)

    for lanes, offset, group in with_neighbours(in_lanes(cells, expr.shape, to), to, at_once):
        made = Cell(*group[0].kind, expr.shape, dtype, to, apart)
        names = [cell.names for cell in group]
        found += _steps_of(made, lanes, offset, names, budget)
    return found


def _steps_of(
    cell: Cell, lanes: int | None, offset: Offset, names: Sequence[tuple[str, ...]], budget: int
) -> Iterator[Step]:
    """One step, or one for each slice. `names`: of the tensors, for each lane."""
    whole = full(cell.expr.shape)
    in_shard = 1 if lanes is None else len(names) // shards(cell.to, lanes)
    recipe = _recipe(cell, whole, lanes, in_shard)
    if not (cuts := slices_of(cell, recipe.cost / budget, lanes)):
        yield _step(cell, recipe, offset, names, [whole] * len(names))
        return
    part = tuple((0, n) for n in cell.expr.shape)
    for cut in cuts:
        part = with_axis(part, cut.axis, (0, cut.n))
    # A step makes a slice in each shard: these are its lanes.
    sharded = next((cut for cut in cuts if lanes is None and cut.pieces > 1), None)
    recipe = _recipe(cell, part, sharded.axis if sharded else lanes, in_shard)
    for starts in product(*(cut.starts(cell.expr.shape) for cut in cuts)):
        box, moved = part, offset
        for cut, at in zip(cuts, starts, strict=True):
            box = with_axis(box, cut.axis, (at, at + cut.n))
            moved = (*moved[: cut.axis], moved[cut.axis] + at, *moved[cut.axis + 1 :])
        if sharded is None:
            yield _step(cell, recipe, moved, names, [box] * len(names))
        else:
            boxes = [*sharded.in_shards(box, cell.expr.shape)]
            yield _step(cell, recipe, moved, list(names) * len(boxes), boxes)


def _step(
    cell: Cell,
    recipe: Recipe,
    offset: Offset,
    names: Sequence[tuple[str, ...]],
    boxes: Sequence[Box],
) -> Step:
    reads = [
        [Read(of[int(r.name)], r.box) for r in reads_of(cell.expr, box)]
        for of, box in zip(names, boxes, strict=True)
    ]
    return Step(recipe, offset, tuple(zip(*reads, strict=True)))


@remembered
def _at_once(cell: Cell, axis: int, most: int, budget: int) -> int:
    """How many adjacent cells of a shard one step should make: as few as give long runs, or whole
    tensors, to each process."""
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


@remembered
def _recipe(cell: Cell, box: Box, lanes: int | None, in_shard: int = 1) -> Recipe:
    reads = []
    pulled = _pulled_back(cell, box, lanes)
    shapes = {tensor.name: tensor.shape for tensor in tensors(cell.expr)}
    for read, spec in pulled:
        shape, entries = dims(read.box), spec
        if lanes is not None:
            shape = (shards(cell.to, lanes) * in_shard, *shape)
            entries = [mesh_axes(cell.to, lanes) or None, *spec]
        sharding = NamedSharding(cell.to.mesh, PartitionSpec(*entries))
        dtype, chunk = cell.stored[int(read.name)]
        chunks = Chunks(chunk, tuple(lo for lo, _ in read.box)) if chunk else None
        has_lanes = lanes is not None
        reads.append(cell_read(shape, dtype, sharding, shapes[read.name], has_lanes, chunks))
    return Recipe(
        cell.expr,
        box,
        tuple(reads),
        lanes,
        cell.shape,
        cell.dtype,
        cell.to,
    )


def _pulled_back(cell: Cell, box: Box, lanes: int | None) -> list[tuple[Read, list[Any]]]:
    """Each read with its sharding, one PartitionSpec entry per axis.

    The mesh axes of a leaf's axis pass on to the axis of the tensor that it divides into equal,
    ordered pieces. If there is none (it is divided inside a permuted atom, or that axis is already
    sharded) the read is replicated over these mesh axes.
    """
    reads = reads_of(cell.expr, box)
    specs: list[list[Any]] = [[None] * len(read.box) for read in reads]
    for axis, (lo, hi) in enumerate(box):
        pieces = shards(cell.to, axis)
        if axis == lanes or pieces == 1:
            continue
        if hi - lo != cell.shape[axis]:
            continue
        for spec, cut in zip(specs, even_cuts(cell.expr, box, axis, pieces), strict=True):
            if cut is not None and spec[cut] is None:
                spec[cut] = mesh_axes(cell.to, axis)
    return list(zip(reads, specs, strict=True))


def nbytes_by_process(steps: Iterable[Step], shapes: Mapping[str, Shape]) -> Counter[int]:
    """Bytes that each process reads for some steps.

    All steps of a recipe read equally many bytes, except at the ends of tensors and where lanes
    read the same box; the others are counted together, as there may be 50,000, and 1000 processes.
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
    """Bytes that a process reads for a step, without those past the end of a tensor."""
    total = 0
    for read, sources in step.reads_of(process):
        elements = sum(volume(clip(s.box, shapes[s.name])) for s in sources)
        total += elements * read.dtype.itemsize
    return total
