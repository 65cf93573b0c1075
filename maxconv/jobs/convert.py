"""Converts a checkpoint: saves every leaf, then verifies what was saved."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import replace
from functools import partial

import jax

from maxconv.config import Config
from maxconv.errors import VerificationError
from maxconv.execution.engine import Engine
from maxconv.execution.program import Programs
from maxconv.jobs.prepare import Job, prepared
from maxconv.jobs.reporter import Reporter
from maxconv.jobs.tracing import traced
from maxconv.jobs.verify import Report, leaves_to_check, verify
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.planning.slabs import Slab
from maxconv.processes import liveness
from maxconv.targets import place
from maxconv.targets.base import Progress
from maxconv.targets.lazy import LazyTensor, Part


def run(
    config: Config,
    reporter: Reporter | None = None,
    preparing: Callable[[Config], AbstractContextManager[Job]] = prepared,
) -> Job:
    """Converts a checkpoint, and verifies it as configured.

    Args:
        config: of the job.
        reporter: is given notices, progress and results.
        preparing: plans the job: a conversion, or a new layout.

    Raises:
        UserError: the arguments or the input are invalid; nothing was written.
        VerificationError: the checkpoint that was written differs from its source.
    """
    started, reporter = time.monotonic(), reporter or Reporter()
    with (
        preparing(config) as job,
        Programs(job.plan.recipes) as programs,
        closing(job.target),
    ):
        for notice in job.notices:
            reporter.note(notice)
        with liveness.all_or_none(), liveness.unsaved(), traced(config, reporter):
            if job.there != "finished":
                _save(job, programs, reporter)
            job.target.commit(job.record)
        reporter.saved(job, time.monotonic() - started)
        check(job, place.items(job.target.directory), config.verify, reporter, programs)
    return job


def _save(job: Job, programs: Programs, reporter: Reporter) -> None:
    """Saves the leaves, except those that an earlier attempt finished."""
    kept, notices = job.target.begin(job.record, resume=job.there == "unfinished")
    if kept:
        notices = (*notices, f"{len(kept)} of {len(job.plan.leaves)} leaves are already saved")
    for notice in notices:
        reporter.note(notice)
    leaves = tuple(leaf for leaf in job.plan.leaves if leaf.name not in kept)
    left = replace(job.plan, leaves=leaves)
    progress = Progress(total=sum(leaf.local_nbytes for leaf in leaves))
    with Engine(left, job.source, job.window, programs) as engine:
        parts = _parts(left, engine.make_slabs)

        def array(planned: LeafPlan) -> LazyTensor | jax.Array:
            lazy = _lazy(planned, parts.get(planned.name, ()))
            is_made = planned.name in parts and not job.config.lazy_load_tensors
            return lazy.load() if is_made else lazy

        with reporter.progress("written", lambda: (progress.written, progress.total)):
            job.target.write({leaf.name: array(leaf) for leaf in job.plan.leaves}, progress)


def _parts(
    plan: Plan, make: Callable[[Sequence[Slab]], list[jax.Array]]
) -> Mapping[str, Sequence[Part]]:
    """The slabs of each leaf as lazy tensors; loading one makes all slabs of its group."""
    parts: dict[str, list[Part]] = {}
    for number, group in enumerate(plan.groups):
        made = _Made(partial(make, [slab for _, slab in group]))
        for i, (leaf, slab) in enumerate(group):
            take = partial(made.take, i)
            part = LazyTensor(take, slab.shape, slab.dtype, leaf.name, slab.sharding, group=number)
            parts.setdefault(leaf.name, []).append((slab.in_leaf, part))
    return parts


class _Made:
    """Arrays that are made together, and taken one by one."""

    def __init__(self, make: Callable[[], list[jax.Array]]):
        self._make, self._arrays = make, dict[int, jax.Array]()

    def take(self, i: int) -> jax.Array:
        if i not in self._arrays:
            self._arrays = dict(enumerate(self._make()))
        return self._arrays.pop(i)


def _lazy(leaf: LeafPlan, parts: Sequence[Part]) -> LazyTensor:
    def whole() -> jax.Array:
        ((_, part),) = parts
        return part.load()

    return LazyTensor(whole, leaf.shape, leaf.dtype, leaf.name, leaf.sharding, parts)


def check(
    job: Job,
    directory: str,
    mode: str,
    reporter: Reporter,
    programs: Programs | None = None,
) -> None:
    """Reads a checkpoint back and compares it with the source of a job.

    Args:
        job: the conversion.
        directory: of the checkpoint.
        mode: "none", "sample" or "full".
        reporter: is given progress and the result.
        programs: compiled for the job, to be reused.

    Raises:
        VerificationError: it differs from its source.
    """
    if mode == "none":
        return
    started = time.monotonic()
    checked = replace(job.plan, leaves=tuple(leaves_to_check(job.plan, mode)))
    total = sum(slab.nbytes for leaf in checked.leaves for slab in leaf.slabs)
    report = Report()

    def say(now: Report) -> None:
        nonlocal report
        report = now

    with (
        liveness.all_or_none(),
        Engine(checked, job.source, job.window, programs) as engine,
        reporter.progress("verified", lambda: (report.nbytes, total)),
    ):
        report = verify(
            directory,
            job.plan,
            engine,
            job.source,
            mode,
            job.window,
            say,
            job.target.saved,
            job.custom,
        )
    if not report.ok:
        raise VerificationError(directory, report.problems)
    reporter.verified(job, report.leaves, report.witnessed, time.monotonic() - started)
