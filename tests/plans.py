"""Plans without a command line, and leaves made one by one."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from maxconv.execution.engine import Engine
from maxconv.jobs.leaves import conversion_leaves
from maxconv.models.resolve import Model
from maxconv.planning import plan
from maxconv.planning.cells import Recipe
from maxconv.planning.placement import mesh_axes
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.sources import Source


def make_plan(
    source: Source,
    model: Model,
    mesh: Mesh,
    rules: Sequence[Any],
    scan_axis: int | None = 1,
    save_dtype: str = "bfloat16",
    budget: int = 64 << 20,
    slab: float = math.inf,
) -> Plan:
    """The plan of a conversion."""
    leaves, _ = conversion_leaves(source, model, mesh, rules, scan_axis, save_dtype)
    return plan.make_plan(leaves, source.tensors, mesh, budget, slab)


def make_leaf(engine: Engine, leaf: LeafPlan) -> jax.Array:
    """A leaf that is a single slab."""
    return engine.make_slabs(leaf.slabs)[0]


def is_local(recipe: Recipe) -> bool:
    """Whether each device is given just what its part needs: reads are cut as the output is."""
    cut = set().union(*(mesh_axes(recipe.sharding, a) for a in range(len(recipe.shape))))
    return all(
        cut <= set().union(*(mesh_axes(read.sharding, a) for a in range(len(read.shape))))
        for read in recipe.reads
    )
