"""Exports a MaxText checkpoint to Hugging Face: the way back, on the same planner and engine.

Tensors that are read together are made together, in steps of whole chunks: every process is sent
what a step has made of the tensors in its own files, and writes it.
"""

import itertools
import time
from collections.abc import Iterable, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from maxconv.algebra import dims, full
from maxconv.algebra.storage import blocks
from maxconv.execution.engine import Engine
from maxconv.execution.program import Programs
from maxconv.execution.timeline import span
from maxconv.jobs import resume_export
from maxconv.jobs.check_export import check
from maxconv.jobs.export_arrays import Made
from maxconv.jobs.prepare_export import Export
from maxconv.jobs.reporter import Reporter
from maxconv.jobs.tracing import traced
from maxconv.planning.placement import local_boxes
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.planning.slabs import Slab
from maxconv.processes import liveness
from maxconv.processes.agreement import gathered, wait_for_all
from maxconv.targets.base import Progress
from maxconv.targets.export_target import PATIENCE, ExportTarget
from maxconv.targets.shards import File, Writer
from maxconv.text import size

_BLOCK = 16 << 20  # bytes of a tensor that are copied at once
_WRITERS = 4  # threads that copy to files


def run(export: Export, reporter: Reporter) -> None:
    """Makes and writes every tensor, and verifies them as configured.

    Raises:
        VerificationError: a file differs from what numpy makes of the checkpoint.
    """
    started, target = time.monotonic(), export.target
    for notice in export.notices:
        reporter.note(notice)
    if export.finished:
        reporter.note("an earlier attempt has written everything")
    with closing(target):
        with liveness.all_or_none(), liveness.unsaved(), traced(export.config, reporter):
            if not export.finished:
                _save(export, reporter)
                wait_for_all("written", PATIENCE)
                target.commit()
            liveness.saved()
        tensors = [tensor for file in export.files for tensor in file.tensors]
        nbytes, seconds = sum(tensor.nbytes for tensor in tensors), time.monotonic() - started
        reporter.exported(target.place, len(tensors), len(export.files), nbytes, seconds)
        if export.config.verify != "none":
            check(export, reporter)


def _save(export: Export, reporter: Reporter) -> None:
    """Writes every file of this process, except for what an earlier attempt wrote."""
    target, progress = export.target, Progress(total=_nbytes(export.mine))
    kept, notices = target.begin(*resume_export.terms(export))
    by_all = set[str].intersection(*map(set, gathered([*kept])))
    plan = _without(export.plan.of(jax.process_index()), by_all, kept.keys())
    left = {_part(leaf, slab) for leaf, slab in itertools.chain.from_iterable(plan.groups)}
    progress.written = sum(nbytes for part, nbytes in kept.items() if part not in left)
    if done := sum(gathered(progress.written)):
        notices = (*notices, f"{size(done)} of {size(_nbytes(export.files))} are already written")
    for notice in notices:
        reporter.note(notice)
    with (
        Programs(plan.recipes) as programs,
        Engine(plan, export.tree, export.window, programs) as engine,
        reporter.progress("written", lambda: (progress.written, progress.total)),
    ):
        _write(export, plan, engine, progress)
        _copy(export, kept.keys(), progress)
    with _uploading(target, progress.total, reporter):
        target.finish()


def _nbytes(files: Iterable[File]) -> int:
    """Bytes of the tensors in files."""
    return sum(tensor.nbytes for file in files for tensor in file.tensors)


def _uploading(target: ExportTarget, total: int, reporter: Reporter) -> AbstractContextManager[Any]:
    if target.uploaded is None:
        return nullcontext()
    return reporter.progress("uploaded", lambda: (target.uploaded or 0, total))


def _part(leaf: LeafPlan, slab: Slab) -> str:
    """The name of a slab, the same in each attempt."""
    return f"{leaf.name} {slab.offset}"


def _without(plan: Plan, by_all: Set[str], mine: Set[str]) -> Plan:
    """A plan without slabs that all processes keep, or this one of those that it makes alone."""
    left = [
        replace(p, slabs=tuple(s for s in p.slabs if _part(p, s) not in kept))
        for p in plan.leaves
        for kept in [by_all if p.is_shared else mine]
    ]
    return replace(plan, leaves=tuple(leaf for leaf in left if leaf.slabs))


def _write(export: Export, plan: Plan, engine: Engine, progress: Progress) -> None:
    """Makes every slab in turn; while it is written, the next one is made."""
    target = export.target
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        going: dict[Future[int], tuple[str, int]] = {}

        def collect(most: int) -> None:
            while True:
                for future in [future for future in going if future.done()]:
                    part, _ = going.pop(future)
                    target.wrote(part, future.result())
                    progress.written += future.result()
                if sum(held for _, held in going.values()) <= most:
                    return
                with span("wait", "for room"):
                    wait(going, return_when=FIRST_COMPLETED)

        for group in plan.groups:
            arrays = engine.make_slabs([slab for _, slab in group])
            for (planned, slab), array in zip(group, arrays, strict=True):
                made, nbytes = export.made[planned.name], slab.local_nbytes
                collect(max(0, export.window // 4 - nbytes))
                write = pool.submit(_written, planned.name, made, slab, array, target.writer)
                going[write] = _part(planned, slab), nbytes
            del arrays
        collect(0)


def _copy(export: Export, kept: Set[str], progress: Progress) -> None:
    """Copies the published tensors of this process that the checkpoint has nothing for."""
    writer = export.target.writer
    for name in filter(writer.has, export.back.copied):
        if name in kept:
            continue
        info, written = export.copied(name), 0
        for box in blocks(full(info.shape), info.dtype.itemsize, _BLOCK):
            data = np.empty(dims(box), info.dtype)
            with span("read", name, data.nbytes):
                export.published.read(info, [(box, data)])
            written += writer.write(name, box, data)
        export.target.wrote(name, written)
        progress.written += written


def _written(leaf: str, made: Made, slab: Slab, array: jax.Array, writer: Writer) -> int:
    """Writes what is in a slab of the tensors of this process; returns the bytes."""
    total = 0
    boxes = local_boxes(slab.sharding, slab.shape)
    distinct = {boxes[shard.device]: shard.data for shard in array.addressable_shards}
    for box, shard in distinct.items():
        with span("to host", leaf, shard.nbytes):
            data = np.asarray(shard)
        for name, within, part in made.parts(slab.in_leaf(box)):
            if writer.has(name):
                total += writer.write(name, part, data[within])
    return total
