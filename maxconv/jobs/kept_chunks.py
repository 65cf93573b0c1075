"""Chunks of a MaxText checkpoint that several steps read parts of, kept until the last of them."""

from collections.abc import Iterable

import jax

from maxconv.planning.overread import calls
from maxconv.planning.plan import Plan
from maxconv.sources.trees import TreeSource
from maxconv.text import size


def keep_shared(
    tree: TreeSource, plans: Iterable[Plan], ahead: int, memory: int
) -> tuple[str, ...]:
    """Has a tree keep what the steps of plans read in common, so that each chunk is decoded once.

    Args:
        tree: is read.
        plans: are run one after another.
        ahead: bytes that are read ahead, and may take the place of what is still wanted.
        memory: of the machine, in bytes, of which at most half is used.

    Returns:
        A notice, if that is not enough.
    """
    shared = max((tree.shared(calls(plan, jax.process_index())) for plan in plans), default=0)
    wanted = shared + min(shared, ahead)
    if wanted <= memory // 2:
        tree.keep(wanted)
        return ()
    return (
        f"the chunks of {tree.root} are so large that {size(wanted)} of them would have to be kept "
        "until all steps have read their parts, so they are read several times; use more processes",
    )
