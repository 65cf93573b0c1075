"""Groups the cells of a leaf into steps: the cells of one step are its lanes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jax.sharding import NamedSharding

from maxconv.algebra import Concat, Expr, Shape, Tensor, map_tensors, tensors
from maxconv.planning.placement import local_devices, shards

Offset = tuple[int, ...]


class Stored(NamedTuple):
    """How a tensor is stored: its dtype, and the shape of its chunks, if it has such."""

    dtype: np.dtype
    chunk: Shape | None = None


@dataclass(frozen=True)
class PlacedCell:
    """A cell and its position.

    Attributes:
        offset: in the leaf.
        expr: over tensors named "0", "1", ...
        names: the real names of these tensors.
        stored: how these tensors are stored.
    """

    offset: Offset
    expr: Expr
    names: tuple[str, ...]
    stored: tuple[Stored, ...]

    @property
    def kind(self) -> tuple[Expr, tuple[Stored, ...]]:
        """Cells for which this is equal can be made by one program."""
        return self.expr, self.stored


Group = tuple[int | None, Offset, Sequence[PlacedCell]]
"""Cells of one step: the axis of lanes, or None; the offset in the leaf, on that axis within each
shard; the cells, lane by lane."""


def placed_cells(expr: Expr, stored: Mapping[str, Stored]) -> list[PlacedCell]:
    """The cells of a leaf: the parts that it concatenates. `stored`: how tensors are, by name."""
    cells = []
    for offset, cell in _cells(expr, (0,) * len(expr.shape)):
        anonymous, names = _anonymous(cell)
        cells.append(PlacedCell(offset, anonymous, names, tuple(stored[n] for n in names)))
    return cells


def in_lanes(cells: Sequence[PlacedCell], shape: Shape, to: NamedSharding) -> Iterator[Group]:
    """Groups the cells of a leaf that are at the same place in each shard, if they are alike."""
    for axis, n in enumerate(shape):
        pieces = shards(to, axis)
        if pieces > 1 and any(cell.expr.shape[axis] != n for cell in cells):
            groups: dict[Offset, list[PlacedCell]] = {}
            for cell in cells:
                at = cell.offset
                inner = (*at[:axis], at[axis] % (n // pieces), *at[axis + 1 :])
                groups.setdefault(inner, []).append(cell)
            if all(len(group) == pieces and _alike(group) for group in groups.values()):
                yield from ((axis, at, group) for at, group in groups.items())
                return
    yield from ((None, cell.offset, [cell]) for cell in cells)


def with_neighbours(
    groups: Iterator[Group], to: NamedSharding, at_once: Callable[[PlacedCell, int, int], int]
) -> Iterator[Group]:
    """Merges adjacent groups of a leaf if processes would read only short runs for each.

    `at_once` is given the first cell of a row, the axis of the row and its number of cells per
    shard; it returns how many of them one step should make, a divisor of that number.
    """
    if local_devices(to) == len(to.device_set):  # a single process reads the longest runs anyway
        yield from groups
        return
    found = list(groups)
    if (axis := _axis_of_rows(found, to)) is None:
        yield from found
        return
    rows: dict[Offset, list[Group]] = {}
    for group in found:
        rows.setdefault((*group[1][:axis], *group[1][axis + 1 :]), []).append(group)
    for row in rows.values():
        cells = [cell for _, _, group in row for cell in group]
        is_even = _alike(cells) and _is_even(row, axis)
        n = at_once(cells[0], axis, len(row)) if is_even and cells[0].names else 1
        if n == 1:
            yield from row
            continue
        for i in range(0, len(row), n):
            _, offset, first = row[i]
            yield axis, offset, [row[k][2][s] for s in range(len(first)) for k in range(i, i + n)]


def _axis_of_rows(groups: Sequence[Group], to: NamedSharding) -> int | None:
    """The axis of the lanes; else the unsharded axis along which most cells are adjacent."""
    lanes, offset, _ = groups[0]
    if lanes is not None:
        return lanes
    counts = {
        axis: len({at[axis] for _, at, _ in groups})
        for axis in range(len(offset))
        if shards(to, axis) == 1
    }
    axis = max(counts, key=lambda axis: counts[axis], default=None)
    return axis if axis is not None and counts[axis] > 1 else None


def _is_even(row: Sequence[Group], axis: int) -> bool:
    """Whether the groups of a row are adjacent, without gaps."""
    extent = row[0][2][0].expr.shape[axis]
    start = row[0][1][axis]
    return [at[axis] for _, at, _ in row] == [start + k * extent for k in range(len(row))]


def _cells(expr: Expr, offset: Offset) -> Iterator[tuple[Offset, Expr]]:
    """The parts that a leaf concatenates, with their offsets."""
    if not isinstance(expr, Concat):
        yield offset, expr
        return
    axis = expr.axis
    for part, start, _ in expr.placed():
        yield from _cells(part, (*offset[:axis], offset[axis] + start, *offset[axis + 1 :]))


def _alike(cells: Sequence[PlacedCell]) -> bool:
    """Whether one program can make them all: they differ only in the names of tensors."""
    return len({cell.kind for cell in cells}) == 1


def _anonymous(expr: Expr) -> tuple[Expr, tuple[str, ...]]:
    """The expression with tensors renamed to "0", "1", ..., and their real names."""
    names = list(dict.fromkeys(t.name for t in tensors(expr)))

    numbers = {name: str(number) for number, name in enumerate(names)}
    anonymous = map_tensors(expr, lambda tensor: Tensor(numbers[tensor.name], tensor.shape))
    return anonymous, tuple(names)
