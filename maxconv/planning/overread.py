"""Bytes that are requested from a bucket or the Hub in addition to those that are needed."""

from collections.abc import Iterator

from maxconv.algebra import Box, clip
from maxconv.planning.plan import Plan
from maxconv.sources import Source


def between(plan: Plan, source: Source, process: int) -> int:
    """Upper bound of the bytes in gaps between boxes of a tensor that are read as well."""
    return sum(
        source.between(plan.tensors[name], sorted(boxes)) for name, boxes in calls(plan, process)
    )


def calls(plan: Plan, process: int) -> Iterator[tuple[str, set[Box]]]:
    """The calls of `Source.read` by a process: the tensor, and its boxes."""
    for step in plan.readings:
        for _, reads in step.reads_of(process):
            boxes: dict[str, set[Box]] = {}
            for read in reads:
                box = clip(read.box, plan.tensors[read.name].shape)
                boxes.setdefault(read.name, set()).add(box)
            yield from boxes.items()
