"""What a conversion asks of a bucket or of the Hub beyond the bytes that it needs."""

from maxconv.algebra import Box, clip
from maxconv.planning.plan import Plan
from maxconv.sources import Source


def between(plan: Plan, source: Source, process: int) -> int:
    """Bytes at most that come along as parts of a tensor that are near are asked for together."""
    total = 0
    for step in plan.readings:
        for i, read in enumerate(step.recipe.reads):
            boxes: dict[str, set[Box]] = {}
            for box in (lane for part in read.parts.get(process, ()) for lane in read.lanes(part)):
                of = step.source(i, box)
                boxes.setdefault(of.name, set()).add(clip(of.box, plan.tensors[of.name].shape))
            total += sum(
                source.between(plan.tensors[name], sorted(of)) for name, of in boxes.items()
            )
    return total
