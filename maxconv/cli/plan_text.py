"""The plan of a conversion as text, for `maxconv plan`."""

import time
from collections.abc import Iterator, Sequence

from maxconv.cli.training_command import training_command
from maxconv.execution.tpu_compiler import compile_all
from maxconv.families import Dims
from maxconv.jobs.prepare import Job
from maxconv.planning.estimates import device_estimate, host_estimate
from maxconv.planning.overread import between
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.planning.tpus import Slice
from maxconv.sources import Source
from maxconv.sources.remote import GAP, SPAN
from maxconv.text import duration, percent, size, table

MANY = 20  # processes that are listed one by one
_COMPILED = (
    *("program (first leaf)", "output shape", "arguments and output", "temporaries"),
    "collectives",
)


def plan_text(job: Job, on: Slice | None = None) -> str:
    """The plan of a conversion. `on`: the slice that it is for, with --tpu_type."""
    plan, window = job.plan, job.window
    used = {name: n for name, n in plan.mesh.shape.items() if n > 1}
    mesh = " x ".join(f"{name}={n}" for name, n in used.items()) or "one device"
    reads = {process: plan.read_nbytes(process) for process in plan.processes}
    total = sum(reads.values())
    over, host = total - plan.needed_nbytes, host_estimate(plan, window, job.source)
    device, written = device_estimate(plan, window), -(-plan.output_nbytes // len(reads))
    architecture = job.model.architecture or job.model.family.architectures[0]
    lines = [
        f"source   {source_text(job.source)}",
        f"model    {architecture}: {_sizes(job.model.dims)}",
        f"mesh     {mesh}, {plan.mesh.size} devices, {processes_text(len(reads))}",
        f"output   {len(plan.leaves)} leaves, {size(plan.output_nbytes)}",
        "",
        _leaves(plan.leaves),
        "",
        f"read     {size(total)} in all, {size(over)} ({percent(over, plan.needed_nbytes)}) more "
        f"than needed; the busiest process reads {max(reads.values()) * len(reads) / total:.3f} "
        "times the mean",
        *(f"         process {p}: {size(n)}" for p, n in list(reads.items())[:MANY]),
        f"host     at most {size(host)} of memory per process, in addition to Python and JAX",
        f"device   at most {size(device)} of memory per device",
        *(on_slice(on, host, device, max(reads.values()), written) if on else ()),
        f"compile  {plan.programs} programs, which run in {len(plan.steps)} steps",
        *(f"note     {notice}" for notice in job.notices),
        *(f"train    {command}" for command in [training_command(job)] if command),
    ]
    return "\n".join(lines)


def processes_text(n: int) -> str:
    return "1 process" if n == 1 else f"{n} processes"


def on_slice(on: Slice, host: int, device: int, busiest: int, written: int) -> Iterator[str]:
    """A plan's needs compared with what the slice has, and the minimum network time.

    Args:
        on: the slice.
        host, device: bytes of memory needed at most.
        busiest, written: bytes that a host reads and writes at most.
    """

    def held(needed: int, there: int) -> str:
        return f"{size(needed)} of {size(there)}{', which is not enough' * (needed > there)}"

    yield (
        f"slice    {on.name}: {'x'.join(map(str, on.shape))} chips, {on.hosts} hosts; a host uses "
        f"{held(host, on.machine.ram)}, a chip {held(device, on.kind.hbm)}"
    )
    yield (
        f"time     at least {duration(max(busiest, written) / on.network)}: the busiest host "
        f"reads {size(busiest)} and writes {size(written)} at {on.network * 8 / 1e9:.0f} Gbit/s, "
        "if the storage keeps up"
    )


def source_text(source: Source) -> str:
    """A source in one line."""
    total = sum(info.nbytes for info in source.tensors.values())
    return f"{source.root}, {len(source.tensors)} tensors, {size(total)}"


def _sizes(d: Dims) -> str:
    tied = ", tied embeddings" if d.tied else ""
    return (
        f"{d.layers} layers, emb {d.emb}, mlp {d.mlp}, {d.heads} heads, {d.kv_heads} kv_heads, "
        f"head_dim {d.head_dim}, vocab {d.vocab}{tied}"
    )


def _leaves(leaves: Sequence[LeafPlan]) -> str:
    """One line per leaf; identical unscanned layers share a line."""
    kinds: dict[tuple[object, ...], list[LeafPlan]] = {}
    for leaf in leaves:
        path = [
            p.rstrip("0123456789") if p.startswith("layers_") else p for p in leaf.name.split(".")
        ]
        kinds.setdefault((*path, leaf.shape, leaf.sharding), []).append(leaf)
    rows = []
    for alike in kinds.values():
        first = alike[0]
        name = path_text(first)
        if len(alike) > 1:
            name = name.replace("layers_0", f"layers_{{0..{len(alike) - 1}}}")
        spec = ", ".join(_axes(entry) for entry in first.sharding.spec)
        ways = dict.fromkeys(read.way for step in first.steps for read in step.recipe.reads)
        nbytes = size(first.nbytes * len(alike))
        rows.append((name, first.shape, first.dtype, f"({spec})", nbytes, "; ".join(ways)))
    return table(rows, ("leaf", "shape", "dtype", "sharding", "bytes", "read"))


def path_text(leaf: LeafPlan) -> str:
    """The path of a parameter in MaxText's tree, without the prefix that all have."""
    return leaf.name.removeprefix("params.params.").replace(".", "/")


def _axes(entry: object) -> str:
    return "+".join(entry) if isinstance(entry, tuple) else str(entry or "-")


def network_text(plan: Plan, source: Source) -> str:
    """The requests of process 0, for a remote source; empty for local files."""
    if not source.is_shared:
        return ""
    process = plan.processes[0]
    planned, more = plan.read_nbytes(process), between(plan, source, process)
    so_far = source.traffic
    return (
        f"\nnetwork  process {process} requests {size(planned)} in ranges of up to {size(SPAN)}, "
        f"and at most {size(more)} ({percent(more, planned)}) in gaps of up to {size(GAP)} that "
        f"are read through; headers took {so_far.requests} requests, {size(so_far.nbytes)}"
    )


def compiled_text(plan: Plan) -> str:
    """A table of the plan's programs as the TPU compiler compiles them."""
    started = time.monotonic()
    found = compile_all(plan)
    first = {step.recipe: leaf for leaf in reversed(plan.leaves) for step in leaf.steps}
    rows = [
        (
            path_text(first[recipe]),
            "x".join(str(hi - lo) for lo, hi in recipe.box),
            size(cell.arguments),
            size(cell.temporaries),
            ", ".join(cell.collectives) or "none",
        )
        for recipe, cell in found.items()
    ]
    most = max(cell.arguments + cell.temporaries for cell in found.values())
    took = time.monotonic() - started
    return "\n".join(
        [
            table(rows, _COMPILED),
            "",
            f"compiled {len(rows)} programs for {plan.mesh.size} chips in {took:.0f} s; the "
            f"largest needs {size(most)} on a chip",
        ]
    )
