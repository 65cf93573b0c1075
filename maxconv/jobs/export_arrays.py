"""The arrays of an export: many tensors in one, and where each of them is in it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxconv.algebra import AlgebraError, Box, Expr, apply, full, rearrange
from maxconv.algebra.together import Stack
from maxconv.planning.owners import Division
from maxconv.planning.slicing import even_cuts, reads_of
from maxconv.sources import TensorInfo

AXES = ("outer", "inner", "local")


@dataclass(frozen=True)
class Made:
    """The tensors of a stack as one array.

    Attributes:
        stack: the tensors.
        whole: all of them, (*leading, *shape), with anything after them on leading axes.
        cuts: into how many equal parts each axis of a tensor is cut; (n, length) in the array
            where it is more than one.
    """

    stack: Stack
    whole: Expr
    cuts: tuple[int, ...]

    @cached_property
    def expr(self) -> Expr:
        names = [f"x{axis}" for axis in range(len(self.whole.shape))]
        counts = dict(zip(names[-len(self.cuts) :], self.cuts, strict=True)) if self.cuts else {}
        cut = {name: n for name, n in counts.items() if n > 1}
        before = (f"(n{name} {name})" if name in cut else name for name in names)
        after = (f"n{name} {name}" if name in cut else name for name in names)
        pattern = f"{' '.join(before)} -> {' '.join(after)}"
        return apply(rearrange(pattern, **{f"n{name}": n for name, n in cut.items()}), self.whole)

    @property
    def axes(self) -> list[int]:
        """The axis of the array that is, or has the parts of, each axis of a tensor."""
        rank = len(self.stack.leading)
        return [rank + i + sum(n > 1 for n in self.cuts[: i + 1]) for i in range(len(self.cuts))]

    @property
    def apart(self) -> tuple[int, ...]:
        """The axes of the numbers of parts."""
        pairs = zip(self.axes, self.cuts, strict=True)
        return tuple(axis - 1 for axis, n in pairs if n > 1)

    def parts(self, box: Box) -> Iterator[tuple[str, tuple[Any, ...], Box]]:
        """For a box of the array: each tensor in it, the index of what is its in the box, and the
        box of the tensor."""
        leading, axes = self.stack.leading, self.axes
        numbers = [axis for axis in range(len(box)) if axis not in axes]  # of tensors and parts
        for within in np.ndindex(*(box[axis][1] - box[axis][0] for axis in numbers)):
            place = {axis: box[axis][0] + i for axis, i in zip(numbers, within, strict=True)}
            tensor = tuple(place[axis] for axis in range(len(leading)))
            if any(at >= n for at, n in zip(tensor, leading, strict=True)):
                continue
            index: list[Any] = [slice(None)] * len(box)
            for axis, i in zip(numbers, within, strict=True):
                index[axis] = i
            moves = (
                place[axis - 1] * self.expr.shape[axis] if n > 1 else 0
                for axis, n in zip(axes, self.cuts, strict=True)
            )
            part = tuple(
                (box[axis][0] + move, box[axis][1] + move)
                for axis, move in zip(axes, moves, strict=True)
            )
            number = int(np.ravel_multi_index(tensor, leading)) if tensor else 0
            yield self.stack.names[number], tuple(index), part


def padded(stack: Stack, axis: int, n: int) -> Expr | None:
    """All of a stack, with anything up to `n` on a leading axis; None if that cannot be."""
    try:
        return stack.padded((*stack.leading[:axis], n, *stack.leading[axis + 1 :]))
    except AlgebraError:
        return None


def made_by_one(stack: Stack, process: int, mesh: Mesh) -> tuple[Made, NamedSharding]:
    """The array of a stack that a process makes alone; `mesh` is (processes, devices of each)."""
    # On a single device: programs over some of a slice's do not run on every kind of it.
    alone = Mesh(mesh.devices[process, :1].reshape(1, 1, 1), AXES)
    return Made(stack, stack.expr, (1,) * len(stack.shape)), NamedSharding(alone, PartitionSpec())


def made_for_all(stack: Stack, mesh: Mesh) -> tuple[Made, NamedSharding]:
    """The array of a stack of which each process has a copy; `mesh` is as above.

    It is divided among the devices of a process along the longest axis that allows it.
    """
    made, local = Made(stack, stack.expr, (1,) * len(stack.shape)), mesh.axis_names[1]
    sizes = dict(enumerate(stack.expr.shape))
    longest = max((n, axis) for axis, n in {**sizes, -1: 0}.items() if n % mesh.shape[local] == 0)
    entries = [local if axis == longest[1] else None for axis in sizes]
    return made, NamedSharding(mesh, PartitionSpec(*entries))


def made_by_all(
    stack: Stack, division: Division, mesh: Mesh, stored: Mapping[str, TensorInfo]
) -> tuple[Made, NamedSharding]:
    """The array of a stack that is divided among processes, along one of its leading axes.

    Processes read whole chunks, divided among them along the axis with most chunks. Along others,
    steps are cut between chunks: these axes are in parts. What is in a chunk is divided among the
    devices of a process.
    """
    count, local = mesh.devices.shape
    rank, axis = len(stack.leading), division.axis
    assert axis is not None
    whole = padded(stack, axis, division.block * count)
    assert whole is not None
    chunks = [_chunks(whole, axis, stored) for axis in range(len(whole.shape))]
    along = max(range(rank, len(chunks)), key=lambda axis: chunks[axis], default=rank)
    cuts = (1 if rank + i == along else n for i, n in enumerate(chunks[rank:]))
    made = Made(stack, whole, tuple(cuts))
    entries: list[Any] = [None] * len(made.expr.shape)
    entries[axis] = AXES[:2]
    others = [at for i, at in enumerate(made.axes) if rank + i != along]
    even = [at for at in others if made.expr.shape[at] % local == 0]
    if even:
        entries[max(even, key=lambda at: made.expr.shape[at])] = AXES[2]
    # Of these processes, each group has chunks of its own on the axis that is divided.
    groups = math.gcd(chunks[axis], count) if division.block * count == division.n else 1
    grid = mesh.devices[list(division.order)].reshape(groups, -1, local)
    return made, NamedSharding(Mesh(grid, AXES), PartitionSpec(*entries))


def _chunks(expr: Expr, axis: int, stored: Mapping[str, TensorInfo]) -> int:
    """Into how many equal parts chunks cut an axis of an array; 1 if the parts are not equal."""
    reads = reads_of(expr, full(expr.shape))
    grids = [_grid(stored[read.name]) for read in reads]
    for count in sorted({n for grid in grids for n in grid}, reverse=True):
        if count > 1 and expr.shape[axis] % count == 0:
            cuts = even_cuts(expr, full(expr.shape), axis, count)
            if any(
                cut is not None and grid[cut] == count
                for cut, grid in zip(cuts, grids, strict=True)
            ):
                return count
    return 1


def _grid(info: TensorInfo) -> list[int]:
    """The number of chunks along each axis of a tensor, 1 where they are not equal."""
    chunk = info.chunk or info.shape
    pairs = zip(info.shape, chunk, strict=True)
    return [size // n if n and size % n == 0 else 1 for size, n in pairs]
