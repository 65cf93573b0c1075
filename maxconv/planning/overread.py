"""What a conversion will ask of a bucket or of the Hub, as far as the plan can tell."""

from maxconv.algebra import Box, clip
from maxconv.planning.plan import Plan
from maxconv.report import percent, size
from maxconv.sources import Source
from maxconv.sources.remote import GAP, SPAN


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


def network_text(plan: Plan, source: Source) -> str:
    """A line for `maxconv plan`; none for a source on disks."""
    if not source.is_shared:
        return ""
    process = plan.processes[0]
    planned, more = plan.read_nbytes(process), between(plan, source, process)
    so_far = source.traffic
    return (
        f"\nnetwork  process {process} asks for {size(planned)} in ranges of {size(SPAN)} at most; "
        f"at most {size(more)} ({percent(more, planned)}) come along, from between parts that lie "
        f"less than {size(GAP)} apart; headers took {so_far.requests} requests, "
        f"{size(so_far.nbytes)}"
    )
