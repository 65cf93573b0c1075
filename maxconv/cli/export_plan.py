"""The plan of an export as text, for `maxconv plan --export`."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

from maxconv.algebra import tensors
from maxconv.cli.plan_text import MANY, on_slice, processes_text, source_text
from maxconv.jobs.prepare_export import Export
from maxconv.planning.estimates import device_estimate, host_estimate
from maxconv.planning.tpus import Slice
from maxconv.sources.trees import Tree
from maxconv.targets.shards import Tensor
from maxconv.text import percent, size, table

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=layers_)\d+")  # of layers and experts in a name


def export_plan(job: Export, on: Slice | None = None) -> str:
    """The plan of an export. `on`: the slice that it is for, with --tpu_type."""
    plan, window = job.plan, job.window
    reads = {process: job.read_nbytes(process) for process in plan.processes}
    writes = {p: sum(file.nbytes for file in job.files_of(p)) for p in plan.processes}
    copied = sum(job.copied(name).nbytes for name in job.back.copied)
    over = sum(reads.values()) - plan.needed_nbytes - copied
    host, device = host_estimate(plan, window, job.tree), device_estimate(plan, window)
    most, written = max(reads.values()), max(writes.values())
    hosts = len(reads)
    lines = [
        f"source   {source_text(job.tree)}",
        *(f"         not read: {text}" for text in _not_read(job.tree)),
        f"model    {job.published.root}: names, dtypes and {len(job.others)} small file(s)",
        f"mesh     {processes_text(hosts)} of {plan.mesh.size // hosts} devices",
        f"output   {_output(job)}",
        "",
        _files(job),
        "",
        _tensors(job),
        "",
        f"read     {size(sum(reads.values()))} in all, {size(over)} "
        f"({percent(over, plan.needed_nbytes)}) more than needed; {_busiest(reads)}",
        f"write    {size(sum(writes.values()))} in all; {_busiest(writes)}",
        *(f"         process {p}: reads {size(reads[p])}, writes {size(writes[p])}"
          for p in plan.processes[:MANY]),
        f"host     at most {size(host)} of memory per process, in addition to Python and JAX; its "
        f"window is {size(window)}",
        f"device   at most {size(device)} of memory per device",
        *(on_slice(on, host, device, most, written) if on else ()),
        f"compile  {plan.programs} programs, which run in "
        f"{len(plan.steps)} steps",
        *(f"note     {notice}" for notice in job.notices),
    ]  # fmt: skip
    return "\n".join(lines)


def _busiest(nbytes: Mapping[int, int]) -> str:
    most, total = max(nbytes.values()), sum(nbytes.values())
    return (
        f"at most {size(most)} by one process, {most * len(nbytes) / max(total, 1):.3f} times "
        "the mean"
    )


def _not_read(tree: Tree) -> Iterator[str]:
    """What a checkpoint has beside the parameters: the state of an optimizer."""
    if left := tree.unread:
        roots = sorted({array.name.partition(".")[0] for array in left})
        nbytes = sum(array.nbytes for array in left)
        yield f"{', '.join(roots)}, {size(nbytes)}"


def _output(job: Export) -> str:
    of = [tensor for file in job.files for tensor in file.tensors]
    where = f"{job.config.base_output_directory}: " if job.config.has_output else ""
    nbytes = size(sum(tensor.nbytes for tensor in of))
    index = " and their index" * (len(job.files) > 1)
    return f"{where}{len(of)} tensors, {nbytes}, in {len(job.files)} file(s){index}"


def _files(job: Export) -> str:
    """A line for each file of weights; of many, for the first ones."""
    rows = [(file.name, file.process, len(file.tensors), size(file.nbytes)) for file in job.files]
    more = len(rows) - MANY
    shown = table(rows[:MANY], ("file", "process", "tensors", "bytes"))
    return f"{shown}\nand {more} more" if more > 0 else shown


def _tensors(job: Export) -> str:
    """A line for tensors that are alike but for the numbers in their names."""
    ways = {
        leaf.name: "; ".join(
            dict.fromkeys(read.way for step in leaf.steps for read in step.recipe.reads)
        )
        for leaf in job.plan.leaves
    }
    kinds: dict[tuple[object, ...], list[tuple[Tensor, Sequence[str]]]] = {}
    written = {tensor.name: tensor for file in job.files for tensor in file.tensors}
    for first, stack in job.stacks.items():
        sources = [tensor.name for tensor in tensors(stack.expr)]
        for tensor in map(written.__getitem__, stack.names):
            kind = _kind(tensor), tuple(_NUMBER.sub("*", name) for name in sources), ways[first]
            kinds.setdefault(kind, []).append((tensor, sources))
    for name in job.back.copied:
        kind = _kind(written[name]), None, "copied"
        kinds.setdefault(kind, []).append((written[name], [job.published.root]))
    rows = [
        (
            short_names(tensor.name for tensor, _ in alike),
            "x".join(map(str, alike[0][0].shape)) or "scalar",
            alike[0][0].dtype,
            size(sum(tensor.nbytes for tensor, _ in alike)),
            short_names(name for _, sources in alike for name in sources),
            way,
        )
        for (*_, way), alike in kinds.items()
    ]
    return table(rows, ("tensors", "shape", "dtype", "bytes", "made of", "read"))


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return _NUMBER.sub("*", tensor.name), tensor.shape, tensor.dtype


def short_names(names: Iterable[str]) -> str:
    """Names, where those that differ in numbers alone are one: `layers.{0..3}.mlp.up.weight`."""
    alike: dict[str, list[list[int]]] = {}
    for name in dict.fromkeys(names):
        numbers = [int(number) for number in _NUMBER.findall(name)]
        alike.setdefault(_NUMBER.sub("{}", name), []).append(numbers)
    return ", ".join(
        template.format(*(_range(sorted(set(column))) for column in zip(*found, strict=True)))
        for template, found in alike.items()
    )


def _range(numbers: Sequence[int]) -> str:
    """Ascending numbers as bash expands them: `{0..3}`, `{5..59..6}`, `{1,2,4}`."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {b - a for a, b in pairwise(numbers)}
    if len(steps) > 1 or len(numbers) == 2:
        return f"{{{','.join(map(str, numbers))}}}"
    (step,) = steps
    return f"{{{numbers[0]}..{numbers[-1]}{f'..{step}' * (step > 1)}}}"
