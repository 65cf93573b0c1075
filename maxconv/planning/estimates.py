"""Upper bounds of the memory that a plan takes, on hosts and on devices."""

from maxconv.planning.plan import LeafPlan, Plan


def host_estimate(plan: Plan, window: int) -> int:
    """Bytes that a process holds at most, beside what it takes to compute one cell."""
    return max(held_nbytes(leaf, window) for leaf in plan.leaves)


def held_nbytes(leaf: LeafPlan, window: int) -> int:
    """Bytes that a process holds while it makes a leaf: the window, unless one part is larger."""
    reads = max(step.recipe.buffer_nbytes for step in leaf.steps)
    slab = max(slab.local_nbytes for slab in leaf.slabs)
    return max(window // 2, reads) + max(window // 2, slab)


def device_estimate(plan: Plan) -> int:
    """Bytes a device holds at most: its shards of two slabs and what two cells read."""
    cells = max(recipe.device_nbytes for recipe in plan.recipes)
    slabs = max(sum(slab.shard_nbytes for _, slab in group) for group in plan.groups)
    return 2 * slabs + 2 * cells
