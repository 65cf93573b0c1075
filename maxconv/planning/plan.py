"""The plan: every leaf with its sharding and its steps, before any tensor is read.

It is made from leaves, each an expression over the tensors of a source, and memory budgets. It does
not depend on where these come from: a model to convert, or a checkpoint to read.
"""

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxconv.algebra import Concat, Expr, Shape, clip, tensors, together, volume
from maxconv.planning.cells import Recipe, Step, nbytes_by_process, steps
from maxconv.planning.lanes import Stored
from maxconv.planning.placement import local_devices, shard_nbytes
from maxconv.planning.slabs import Slab, slabs
from maxconv.sources import TensorInfo


@dataclass(frozen=True)
class Leaf:
    """An array to make: its name in the target, its dtype and its sharding.

    `expr` computes it from the tensors of a source. Along the axes `apart`, a step makes one place.
    """

    name: str
    expr: Expr
    dtype: np.dtype
    sharding: NamedSharding
    apart: tuple[int, ...] = ()

    @property
    def shape(self) -> Shape:
        return self.expr.shape

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors it is computed from, with repeats."""
        return tuple(tensor.name for tensor in tensors(self.expr))


@dataclass(frozen=True)
class LeafPlan:
    """A leaf, and how it is made, slab by slab."""

    leaf: Leaf
    slabs: tuple[Slab, ...]

    @property
    def steps(self) -> list[Step]:
        return [step for slab in self.slabs for step in slab.steps]

    @property
    def name(self) -> str:
        return self.leaf.name

    @property
    def shape(self) -> Shape:
        return self.leaf.shape

    @property
    def dtype(self) -> np.dtype:
        return self.leaf.dtype

    @property
    def sharding(self) -> NamedSharding:
        return self.leaf.sharding

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shard_nbytes(self) -> int:
        return shard_nbytes(self.sharding, self.shape, self.dtype)

    @property
    def local_nbytes(self) -> int:
        """Bytes of its shards on all devices of a process."""
        return self.shard_nbytes * local_devices(self.sharding)

    @property
    def is_shared(self) -> bool:
        """Whether several processes have a part of it."""
        return len({device.process_index for device in self.sharding.device_set}) > 1


Group = tuple[tuple[LeafPlan, Slab], ...]


@dataclass(frozen=True)
class Plan:
    """How a set of leaves is made from the tensors of a source."""

    mesh: Mesh
    leaves: tuple[LeafPlan, ...]
    tensors: Mapping[str, TensorInfo]

    def of(self, process: int) -> "Plan":
        """What a process takes part in: the leaves that its devices have a part of."""
        mine = {d for d in self.mesh.devices.flat if d.process_index == process}
        leaves = (leaf for leaf in self.leaves if mine & leaf.sharding.device_set)
        return Plan(self.mesh, tuple(leaves), self.tensors)

    @property
    def steps(self) -> list[Step]:
        made = {id(slab.made): slab.made for leaf in self.leaves for slab in leaf.slabs}
        return [step for slab in made.values() for step in slab.steps]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The slabs in the order in which they are made."""
        return groups(self.leaves)

    @property
    def readings(self) -> Iterator[Step]:
        """The steps that read: of those that share one read, the first."""
        return (s for group in self.groups for s in group[0][1].steps)

    @cached_property
    def recipes(self) -> dict[Recipe, int]:
        """Every distinct recipe, with the number of its steps."""
        counts: dict[Recipe, int] = {}
        for step in self.steps:
            counts[step.recipe] = counts.get(step.recipe, 0) + 1
        return counts

    @property
    def programs(self) -> int:
        """Number of programs to compile."""
        return sum(not recipe.is_read for recipe in self.recipes) + len(self.blanks)

    @property
    def blanks(self) -> set[tuple[Shape, np.dtype, NamedSharding]]:
        """Shape, dtype and sharding of slabs that are written cell by cell; each is a program."""
        return {(r.shape, r.dtype, r.sharding) for r in self.recipes if not r.is_whole}

    @cached_property
    def digest(self) -> str:
        """Of all that processes must do alike: what differs are programs that wait for each other
        in vain, or abort."""
        devices = [(d.id, d.process_index) for d in self.mesh.devices.flat]
        digest = hashlib.sha256(repr((self.mesh.shape, devices)).encode())
        numbers = {recipe: i for i, recipe in enumerate(self.recipes)}
        for recipe in numbers:
            digest.update(repr(recipe).encode())
        for leaf, slab in itertools.chain.from_iterable(self.groups):
            digest.update(repr((leaf.name, leaf.shape, slab.shape, slab.offset)).encode())
            digest.update(repr(slab.place).encode() if slab.stack else b"")
            for step in slab.steps:
                digest.update(repr((numbers[step.recipe], step.offset, step.sources)).encode())
        return digest.hexdigest()[:12]

    @property
    def output_nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def processes(self) -> list[int]:
        return sorted({d.process_index for d in self.mesh.devices.flat})

    def read_nbytes(self, process: int) -> int:
        """Bytes of tensors that a process reads."""
        return self._reads[process]

    @cached_property
    def _reads(self) -> Mapping[int, int]:
        shapes = {name: info.shape for name, info in self.tensors.items()}
        return nbytes_by_process(self.readings, shapes)

    @cached_property
    def needed_nbytes(self) -> int:
        """Bytes of tensors that the leaves are computed from, each counted once."""
        itemsizes = {
            source: step.recipe.reads[i].dtype.itemsize
            for step in self.steps
            for i, lanes in enumerate(step.sources)
            for source in lanes
        }
        return sum(
            volume(clip(s.box, self.tensors[s.name].shape)) * n for s, n in itemsizes.items()
        )


def groups(leaves: Iterable[LeafPlan]) -> tuple[Group, ...]:
    """The slabs of leaves, in order; those that are made from the same bytes are grouped.

    For example gate and up projections whose columns alternate in one tensor.
    """
    near: dict[object, list[tuple[LeafPlan, Slab]]] = {}
    for leaf in leaves:
        for slab in leaf.slabs:
            near.setdefault((leaf.leaf.tensors or leaf.name, slab.offset), []).append((leaf, slab))
    found: list[Group] = []
    for members in near.values():
        alike: dict[object, list[tuple[LeafPlan, Slab]]] = {}
        for leaf, slab in members:
            readings = tuple(s.reading for s in slab.steps) if len(members) > 1 else ()
            alike.setdefault(readings, []).append((leaf, slab))
        found += map(tuple, alike.values())
    return tuple(found)


def make_plan(
    leaves: Sequence[Leaf],
    tensors: Mapping[str, TensorInfo],
    mesh: Mesh,
    budget: int = 64 << 20,
    slab: float = math.inf,
) -> Plan:
    """Plans how leaves are made.

    Args:
        leaves: over `tensors`, all on `mesh`.
        tensors: of the source, by name.
        budget: maximum memory cost of a step, in bytes per process.
        slab: maximum size of a slab, in bytes per process.
    """
    stored = {name: Stored(info.dtype, info.chunk) for name, info in tensors.items()}
    stacks = list(_stacks(leaves, tensors))
    sharing = Counter(stack.whole.tensors for stack in stacks)
    planned: dict[str, LeafPlan] = {}
    for stack in stacks:
        leaf = stack.whole
        made = steps(leaf.expr, stored, leaf.dtype, leaf.sharding, budget, leaf.apart)
        limit = slab / sharing[leaf.tensors]
        if stack.leading:
            limit /= 2  # it is there while places are taken from it
        in_chunks = any(tensors[name].chunk for name in leaf.tensors)
        first = leaf.expr.axis if in_chunks and isinstance(leaf.expr, Concat) else None
        parts = slabs(made, leaf.shape, leaf.dtype, leaf.sharding, limit, first)
        planned |= {one.leaf.name: one for one in stack.taken(parts)}
    return Plan(mesh, tuple(planned[leaf.name] for leaf in leaves), tensors)


@dataclass(frozen=True)
class _Stack:
    """Leaves that are made together.

    Attributes:
        leaves: in C order of the leading axes.
        leading: lengths of the leading axes; empty for a leaf by itself.
        whole: all of them as one leaf, (*leading, *shape).
    """

    leaves: Sequence[Leaf]
    leading: Shape
    whole: Leaf

    def taken(self, slabs: Sequence[Slab]) -> Iterator[LeafPlan]:
        """The plan of each leaf, for the slabs of the whole."""
        for at, leaf in zip(np.ndindex(*self.leading), self.leaves, strict=True):
            yield LeafPlan(leaf, tuple(self._taken(slabs, at, leaf)) if at else tuple(slabs))

    def _taken(self, slabs: Sequence[Slab], at: tuple[int, ...], leaf: Leaf) -> Iterator[Slab]:
        rank = len(self.leading)
        for slab in slabs:
            place = tuple(i - start for i, start in zip(at, slab.offset, strict=False))
            if all(0 <= i < n for i, n in zip(place, slab.shape, strict=False)):
                shape, offset = slab.shape[rank:], slab.offset[rank:]
                yield Slab(
                    *(shape, leaf.dtype, leaf.sharding, offset, leaf.shape, slab.steps),
                    *(slab, place),
                )


def _stacks(leaves: Sequence[Leaf], tensors: Mapping[str, TensorInfo]) -> Iterator[_Stack]:
    """The leaves; those that are places of one array in chunks, which are read for all, together.

    For example layers, of which each chunk has all.
    """
    alike: dict[object, dict[str, Leaf]] = {}
    for leaf in leaves:
        in_chunks = leaf.tensors and all(tensors[name].chunk for name in leaf.tensors)
        kind = (leaf.dtype, leaf.sharding) if in_chunks and not leaf.apart else leaf.name
        alike.setdefault(kind, {})[leaf.name] = leaf
    for of in alike.values():
        for found in together.stacks({name: leaf.expr for name, leaf in of.items()}):
            first = of[found.names[0]]
            if len(found.names) == 1:
                yield _Stack([first], (), first)
                continue
            spec = PartitionSpec(*(None for _ in found.leading), *first.sharding.spec)
            sharding = NamedSharding(first.sharding.mesh, spec)
            whole = Leaf(first.name, found.expr, first.dtype, sharding)
            yield _Stack([of[name] for name in found.names], found.leading, whole)
