"""What a person reads: the plan, progress while it runs, and what was done."""

from __future__ import annotations

import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self, TextIO

from maxconv.text import LONGEST_CELL, printable

if TYPE_CHECKING:  # sizes are also told where JAX is not needed, and not imported
    from maxconv.planning.plan import LeafPlan, Plan
    from maxconv.planning.tpus import Slice

INTERVAL_ON_TERMINALS = 0.5  # seconds between two looks at how far it is
INTERVAL_IN_LOGS = 10
_MANY = 20  # processes that are worth reading one by one


def size(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 2m05s."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def host_memory() -> int:
    """Bytes of memory that this process holds now."""
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return resident * resource.getpagesize()
    except OSError:
        return peak_memory()


def peak_memory() -> int:
    """Most bytes of memory that this process held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> int:
    """Bytes of memory that this machine has, or lets this container have."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return there
    return min(there, int(allowed)) if allowed.isdigit() else there


def table(rows: Iterable[Sequence[object]], header: Sequence[str]) -> str:
    """Aligned columns; numbers to the right."""
    cells = [[printable(c, LONGEST_CELL) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    right = [all(row[i][:1].isdigit() for row in cells[1:]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in columns).rstrip()

    return "\n".join(map(line, cells))


def plan_text(plan: Plan, window: int, readable: str, on: Slice | None = None) -> str:
    """The plan of a conversion, for `maxconv plan`.

    Args:
        plan: what will be done.
        window: bytes per process for what is read ahead or waits to be written.
        readable: the source, in words.
        on: the slices it is planned for, if they are not here.
    """
    used = {name: n for name, n in plan.mesh.shape.items() if n > 1}
    mesh = " x ".join(f"{name}={n}" for name, n in used.items()) or "one device"
    reads = {process: plan.read_nbytes(process) for process in plan.processes}
    total = sum(reads.values())
    over = total - plan.needed_nbytes
    lines = [
        f"source   {readable}",
        f"model    {plan.model.family.architectures[0]}: {_sizes(plan)}",
        f"mesh     {mesh}, {plan.mesh.size} devices, {len(reads)} process(es)",
        f"output   {len(plan.leaves)} leaves, {size(plan.output_nbytes)}",
        "",
        _leaves(plan.leaves),
        "",
        f"read     {size(total)} in all, {size(over)} ({percent(over, plan.needed_nbytes)}) more "
        f"than the tensors used; largest share {max(reads.values()) * len(reads) / total:.3f} of "
        "the mean",
        *(f"         process {p}: {size(n)}" for p, n in list(reads.items())[:_MANY]),
        f"host     at most {size(host_estimate(plan, window))} per process beside Python and JAX",
        f"device   at most {size(device_estimate(plan))} on each",
        *(_on_slice(plan, window, on) if on else ()),
        f"compile  {len(plan.recipes) + len(plan.blanks)} programs, for {len(plan.steps)} steps",
        *(f"note     {notice}" for notice in plan.notices),
    ]
    return "\n".join(lines)


def _on_slice(plan: Plan, window: int, on: Slice) -> Iterator[str]:
    """What a slice has of what the plan needs, and how long its network takes at least."""
    kind, busiest = on.kind, max(map(plan.read_nbytes, plan.processes))
    written = -(-plan.output_nbytes // len(plan.processes))

    def held(needed: int, there: int) -> str:
        return f"{size(needed)} of {size(there)}{', which is too little' * (needed > there)}"

    yield (
        f"slice    {on.name}: {'x'.join(map(str, on.shape))} chips, {on.hosts} hosts; a host holds "
        f"{held(host_estimate(plan, window), on.machine.ram)}, "
        f"a chip {held(device_estimate(plan), kind.hbm)}"
    )
    yield (
        f"time     at least {duration(max(busiest, written) / on.network)}: the busiest host "
        f"reads {size(busiest)} and writes {size(written)} at {on.network * 8 / 1e9:.0f} Gbit/s, "
        "if the storage keeps up"
    )


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


def _sizes(plan: Plan) -> str:
    d = plan.model.dims
    tied = ", tied embeddings" if d.tied else ""
    return (
        f"{d.layers} layers, emb {d.emb}, mlp {d.mlp}, {d.heads} heads, {d.kv_heads} kv_heads, "
        f"head_dim {d.head_dim}, vocab {d.vocab}{tied}"
    )


def _leaves(leaves: Sequence[LeafPlan]) -> str:
    """One line a leaf; unscanned layers that are alike share one."""
    kinds: dict[tuple[object, ...], list[LeafPlan]] = {}
    for leaf in leaves:
        path = [p.rstrip("0123456789") if p.startswith("layers_") else p for p in leaf.leaf.path]
        kinds.setdefault((*path, leaf.shape, leaf.sharding), []).append(leaf)
    rows = []
    for alike in kinds.values():
        first = alike[0]
        name = "/".join(first.leaf.path[1:])
        if len(alike) > 1:
            name = name.replace("layers_0", f"layers_{{0..{len(alike) - 1}}}")
        spec = ", ".join(_axes(entry) for entry in first.sharding.spec)
        ways = dict.fromkeys(read.way for step in first.steps for read in step.recipe.reads)
        nbytes = size(first.nbytes * len(alike))
        rows.append((name, first.shape, first.dtype, f"({spec})", nbytes, "; ".join(ways)))
    return table(rows, ("leaf", "shape", "dtype", "sharding", "bytes", "read"))


def _axes(entry: object) -> str:
    return "+".join(entry) if isinstance(entry, tuple) else str(entry or "-")


def percent(part: int, whole: int) -> str:
    """A part in percent of the whole: 1.5 %."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


class ProgressLine:
    """Prints how far a conversion is: one line that moves on a terminal, a line now and then else.

    Args:
        label: what is being done.
        done: gives bytes done so far and in all.
        out: where to; None keeps quiet.
    """

    def __init__(self, label: str, done: Callable[[], tuple[int, int]], out: TextIO | None):
        self._label, self._done, self._out = label, done, out
        self._live = bool(out and out.isatty())
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_ON_TERMINALS if self._live else INTERVAL_IN_LOGS):
            assert self._out is not None
            if self._live:  # cut to one row, else \r would not come back to its beginning
                columns = os.get_terminal_size(self._out.fileno()).columns or 80
                self._out.write(f"\r{self._text()[: columns - 1]}\x1b[K")
            else:
                self._out.write(self._text() + "\n")
            self._out.flush()

    def _text(self) -> str:
        done, total = self._done()
        rate = done / (time.monotonic() - self._started)
        known = done and 100 * done >= total  # before, the time that is left is a wild guess
        pace = f", {size(rate)}/s, {duration((total - done) / rate)} left" if known else ""
        return (
            f"{self._label} {size(done)} of {size(total)} ({percent(done, total)}){pace}, "
            f"memory {size(host_memory())}"
        )

    def __enter__(self) -> Self:
        if self._out is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._live and self._out is not None:
            self._out.write("\r\x1b[K")
            self._out.flush()
