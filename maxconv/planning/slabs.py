"""Splits leaves into slabs, which are made and written in turn, so that no leaf is held whole.

A slab consists of the same part of every shard of its leaf, and so is an array over the mesh in the
sharding of the leaf. A leaf that is small enough is a single slab.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import NamedSharding

from maxconv.algebra import Box, Shape, dims
from maxconv.planning.cells import Offset, Recipe, Step
from maxconv.planning.placement import local_devices, shard_nbytes, shards


@dataclass(frozen=True)
class Slab:
    """A part of a leaf.

    Attributes:
        shape, dtype, sharding: of the slab, as an array over the mesh.
        offset: of the slab within each shard of the leaf.
        leaf: shape of the leaf.
        steps: the steps that make it, or the stack that it is a place of.
        stack: the slab of several leaves at once that it is taken from, if it is not made alone.
        place: of it in the stack, along the leading axes.
    """

    shape: Shape
    dtype: np.dtype
    sharding: NamedSharding
    offset: Offset
    leaf: Shape
    steps: tuple[Step, ...]
    stack: "Slab | None" = None
    place: tuple[int, ...] = ()

    @property
    def made(self) -> "Slab":
        """What the steps make: the slab itself, or the stack."""
        return self.stack or self

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shard_nbytes(self) -> int:
        return shard_nbytes(self.sharding, self.shape, self.dtype)

    @property
    def local_nbytes(self) -> int:
        """Bytes of it on all devices of a process."""
        return self.shard_nbytes * local_devices(self.sharding)

    def in_leaf(self, box: Box) -> Box:
        """The box of the leaf for a box of the slab, which must lie within one shard."""
        local = self.sharding.shard_shape(self.shape)
        whole = self.sharding.shard_shape(self.leaf)
        moves = (
            lo // n * m + at - lo // n * n if n else 0
            for (lo, _), n, m, at in zip(box, local, whole, self.offset, strict=True)
        )
        return tuple((lo + move, hi + move) for (lo, hi), move in zip(box, moves, strict=True))


def slabs(
    steps: Sequence[Step],
    shape: Shape,
    dtype: np.dtype,
    to: NamedSharding,
    limit: float,
    first: int | None = None,
) -> tuple[Slab, ...]:
    """Splits a leaf into slabs of at most `limit` bytes per process, as far as its steps allow.

    Args:
        steps: the steps that make the leaf.
        shape: of the leaf.
        dtype: of the leaf.
        to: sharding of the leaf.
        limit: bytes per process.
        first: the axis to cut before any other, as far as that helps.
    """
    whole = Slab(shape, dtype, to, (0,) * len(shape), shape, tuple(steps))
    parts = _parts(_grid(whole), whole.local_nbytes / limit, first)
    if math.prod(parts) == 1:
        return (whole,)
    cut = tuple(n // p for n, p in zip(shape, parts, strict=True))
    extents = tuple(n // p for n, p in zip(to.shard_shape(shape), parts, strict=True))
    recipes: dict[Recipe, Recipe] = {}
    found: dict[Offset, list[Step]] = {}
    for step in steps:
        if step.recipe not in recipes:
            recipes[step.recipe] = replace(step.recipe, shape=cut)
        pairs = zip(step.offset, extents, parts, strict=True)
        offset = tuple(at // n * n if p > 1 else 0 for at, n, p in pairs)
        inner = tuple(at - start for at, start in zip(step.offset, offset, strict=True))
        moved = replace(step, recipe=recipes[step.recipe], offset=inner)
        found.setdefault(offset, []).append(moved)
    return tuple(replace(whole, shape=cut, offset=at, steps=tuple(s)) for at, s in found.items())


def _grid(whole: Slab) -> list[int]:
    """The number of equal intervals into which the steps of a leaf divide each axis of a shard."""
    grid = []
    for axis, n in enumerate(whole.sharding.shard_shape(whole.shape)):
        intervals = {_interval(step, axis, whole) for step in whole.steps}
        extents = {extent for _, extent in intervals}
        extent = max(extents, default=n)
        is_even = len(extents) == 1 and all(at % extent == 0 for at, _ in intervals)
        grid.append(n // extent if is_even and n else 1)
    return grid


def _interval(step: Step, axis: int, leaf: Slab) -> tuple[int, int]:
    """Offset and length, within each shard, of the part of an axis that a step makes.

    The whole axis, if the step does not make the same part of every shard.
    """
    n, pieces = leaf.shape[axis], shards(leaf.sharding, axis)
    extent = dims(step.recipe.box)[axis]
    if step.recipe.lanes == axis:
        return step.offset[axis], extent * step.recipe.lanes_in_shard
    if pieces == 1:
        return step.offset[axis], extent
    return 0, n // pieces


def _parts(grid: Sequence[int], excess: float, first: int | None) -> list[int]:
    """The number of parts along each axis; their product is at least `excess` if possible."""
    parts = [1] * len(grid)
    while excess > 1 and (left := [a for a, n in enumerate(grid) if n > 1 and parts[a] == 1]):
        tried = [first] if first in left else left
        enough = [(p, a) for a in tried for p in _divisors(grid[a]) if p >= excess]
        most = [(grid[a], a) for a in tried]
        n, axis = min(enough) if enough else max(most)
        parts[axis] = n
        excess /= n
    return parts


def _divisors(n: int) -> Iterator[int]:
    return (p for p in range(1, n + 1) if n % p == 0)
