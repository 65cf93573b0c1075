"""Upper bounds of the memory that a plan needs, on hosts and on devices."""

from collections import deque

from maxconv.planning.plan import LeafPlan, Plan
from maxconv.sources import Source


def host_estimate(plan: Plan, window: int, source: Source) -> int:
    """Maximum host memory of a process, in bytes, without the temporaries of one cell."""
    held = max(held_nbytes(leaf, window) for leaf in plan.leaves)
    return held + reading_estimate(plan, window, source) - ahead_estimate(plan, window)


def reading_estimate(plan: Plan, window: int, source: Source) -> int:
    """Maximum bytes that a process holds for reading: data read ahead, and buffers of requests."""
    ahead = ahead_estimate(plan, window)
    return ahead + source.held(ahead)


def ahead_estimate(plan: Plan, window: int) -> int:
    """Maximum bytes that a process reads ahead: half the window, unless one step is larger."""
    return max(window // 2, max(recipe.buffer_nbytes for recipe in plan.recipes))


def held_nbytes(leaf: LeafPlan, window: int) -> int:
    """Bytes that a process holds for a leaf: the window, unless a step or a slab is larger."""
    reads = max(step.recipe.buffer_nbytes for step in leaf.steps)
    slab = max(slab.local_nbytes for slab in leaf.slabs)
    return max(window // 2, reads) + max(window // 2, slab)


def device_estimate(plan: Plan, window: int) -> int:
    """Maximum device memory in bytes: shards of two slabs, data read ahead, and the inputs of two
    cells before and after the exchange."""
    cells = max(recipe.device_nbytes for recipe in plan.recipes)
    slabs = max(sum(slab.shard_nbytes for _, slab in group) for group in plan.groups)
    return 2 * slabs + _ahead_on_device(plan, window // 2) + 2 * cells


def _ahead_on_device(plan: Plan, limit: int) -> int:
    """Maximum bytes on a device of steps that are read ahead.

    Like the engine, reads ahead as many steps as fit in `limit` bytes per process, where data that
    devices share counts once.
    """
    steps, ahead = deque[tuple[int, int]](), 0
    on_host = most = 0
    for step in plan.readings:
        recipe = step.recipe
        shard = sum(read.shard_nbytes for read in recipe.reads)
        while steps and on_host + recipe.buffer_nbytes > limit:
            host, device = steps.popleft()
            on_host, ahead = on_host - host, ahead - device
        steps.append((recipe.buffer_nbytes, shard))
        on_host, ahead = on_host + recipe.buffer_nbytes, ahead + shard
        most = max(most, ahead)
    return most
