"""The plan: every leaf with its sharding and its steps, checked before a tensor byte moves."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxconv.algebra import (
    AlgebraError,
    Shape,
    check_covered,
    clip,
    substitute,
    tensors,
    unused,
    volume,
)
from maxconv.config.mesh import partition_spec
from maxconv.errors import UserError
from maxconv.families import Leaf, bind_rows
from maxconv.models.canonical_names import misfit, rounded, saved_dtype
from maxconv.models.resolve import Model
from maxconv.planning.cells import Recipe, Step, nbytes_by_process, steps
from maxconv.planning.placement import local_devices, shard_nbytes
from maxconv.planning.slabs import Slab, slabs
from maxconv.sources import Source, TensorInfo


@dataclass(frozen=True)
class LeafPlan:
    """A leaf: what it is, where it lives, how it comes about, slab by slab.

    `replicated` says, in words, which axes could not be sharded as the rules have it.
    """

    leaf: Leaf
    dtype: np.dtype
    sharding: NamedSharding
    slabs: tuple[Slab, ...]
    replicated: tuple[str, ...]

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
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shard_nbytes(self) -> int:
        return shard_nbytes(self.sharding, self.shape, self.dtype)

    @property
    def local_nbytes(self) -> int:
        """Bytes of a process' shards on all its devices."""
        return self.shard_nbytes * local_devices(self.sharding)


Group = tuple[tuple[LeafPlan, Slab], ...]


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `notices` are sentences the user should see."""

    model: Model
    mesh: Mesh
    leaves: tuple[LeafPlan, ...]
    tensors: Mapping[str, TensorInfo]
    notices: tuple[str, ...]

    @property
    def steps(self) -> list[Step]:
        return [step for leaf in self.leaves for step in leaf.steps]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The slabs in the order in which they are made."""
        return groups(self.leaves)

    @property
    def readings(self) -> Iterator[Step]:
        """Of steps that are made of one reading, the first."""
        return (s for group in self.groups for s in group[0][1].steps)

    @cached_property
    def recipes(self) -> dict[Recipe, int]:
        """Every distinct recipe, with the number of its steps."""
        counts: dict[Recipe, int] = {}
        for step in self.steps:
            counts[step.recipe] = counts.get(step.recipe, 0) + 1
        return counts

    @property
    def blanks(self) -> set[tuple[Shape, np.dtype, NamedSharding]]:
        """The kinds of slabs that are written cell by cell: each is compiled, too."""
        return {(r.shape, r.dtype, r.sharding) for r in self.recipes if not r.is_whole}

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
        """Bytes of tensors that the leaves are made of, each counted once."""
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
    """The slabs of leaves, in order; those together that are made of the same bytes.

    So gate and up projections whose columns alternate in one tensor are made side by side.
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
    source: Source,
    model: Model,
    mesh: Mesh,
    rules: Sequence[Any],
    scan_axis: int | None = 1,
    save_dtype: np.dtype | str = "bfloat16",
    budget: int = 64 << 20,
    slab: float = math.inf,
) -> Plan:
    """Plans a conversion.

    Args:
        source: the checkpoint's tensors.
        model: what they are.
        mesh: MaxText's training mesh.
        rules: MaxText's logical axis rules.
        scan_axis: param_scan_axis, or None for unscanned layers.
        save_dtype: of the leaves.
        budget: bytes that a step should read at most, in a process.
        slab: bytes of a leaf that should be made before they are written, in a process.

    Raises:
        UserError: everything that does not fit, at once.
    """
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    to_save = np.dtype(save_dtype)
    stored = weights = model.tensors
    if model.rounds:
        weights = {n: rounded(x, dtypes, to_save) for n, x in stored.items()}
    planned, notices = [], list(model.notices)
    leaves = [
        replace(leaf, expr=substitute(leaf.expr, stored if _has_integers(leaf) else weights))
        for leaf in _checked_leaves(source, model, scan_axis)
    ]
    kinds = [np.dtype(leaf.dtype or saved_dtype(leaf.expr, dtypes, to_save)) for leaf in leaves]
    problems = {misfit(x.expr, dtypes, to): None for x, to in zip(leaves, kinds, strict=True)}
    if found := [f"{source.root}: {problem}." for problem in problems if problem]:
        raise UserError(found)
    sharing = Counter(leaf.tensors for leaf in leaves)
    for leaf, dtype in zip(leaves, kinds, strict=True):
        spec, dropped = partition_spec(leaf.logical, leaf.shape, dict(mesh.shape), rules)
        to = NamedSharding(mesh, spec)
        made = steps(leaf.expr, dtypes, dtype, to, budget)
        parts = slabs(made, leaf.shape, dtype, to, slab / sharing[leaf.tensors])
        planned.append(LeafPlan(leaf, dtype, to, parts, dropped))
    for words in dict.fromkeys(w for leaf in planned for w in leaf.replicated):
        notices.append(f"{words}: that axis is replicated")
    return Plan(model, mesh, tuple(planned), source.tensors, tuple(notices))


def _has_integers(leaf: Leaf) -> bool:
    return np.dtype(leaf.dtype or np.float32).kind in "iu"


def _checked_leaves(source: Source, model: Model, scan_axis: int | None) -> list[Leaf]:
    """Every leaf of the model over its logical tensors, once all is right with them."""
    family = model.family
    architecture = family.architectures[0]
    if scan_axis is not None and not family.scans:
        raise UserError(f"MaxText cannot scan the layers of {architecture}: add scan_layers=False.")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    leaves, problems = bind_rows(model.rows, shapes, scan_axis)
    expressions = {leaf.name: leaf.expr for leaf in leaves}
    if not problems:
        try:
            check_covered(expressions)  # only a table whose slices tile can be turned round
        except AlgebraError as error:
            problems += str(error).splitlines()
        left = [n for n in unused(expressions, list(shapes)) if not model.is_dropped(n)]
        found = [next(tensors(model.tensors[n])).name for n in left]
        problems += [f"{architecture} has no use for tensor {n}" for n in found]
    if problems:
        raise UserError([f"{source.root}: {p}." for p in problems])
    return leaves
