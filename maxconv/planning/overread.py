"""Bytes that are requested from a bucket or the Hub in addition to those that are needed."""

from maxconv.algebra import Box, clip
from maxconv.planning.plan import Plan
from maxconv.sources import Source


def between(plan: Plan, source: Source, process: int) -> int:
    """Upper bound of the bytes in gaps between boxes of a tensor that are read as well."""
    total = 0
    for step in plan.readings:
        for _, reads in step.reads_of(process):
            boxes: dict[str, set[Box]] = {}
            for read in reads:
                box = clip(read.box, plan.tensors[read.name].shape)
                boxes.setdefault(read.name, set()).add(box)
            total += sum(
                source.between(plan.tensors[name], sorted(of)) for name, of in boxes.items()
            )
    return total
