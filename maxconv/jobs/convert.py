"""A conversion from beginning to end: source, plan, checks, save, verification."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
from etils import epath

from maxconv import __version__
from maxconv.config import Config
from maxconv.errors import UserError, VerificationError
from maxconv.execution import timeline
from maxconv.execution.engine import Engine
from maxconv.execution.program import Programs
from maxconv.jobs import resume
from maxconv.jobs.prepare import Job, prepared
from maxconv.jobs.verify import Report, leaves_to_check, verify
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.planning.slabs import Slab
from maxconv.processes import liveness
from maxconv.processes import start as distributed
from maxconv.report import ProgressLine, duration, peak_memory, size
from maxconv.sources.orbax import find_items
from maxconv.targets import hub as publish
from maxconv.targets import orbax
from maxconv.targets import place as target
from maxconv.targets.lazy import LazyTensor, Part
from maxconv.text import printable


def run(config: Config) -> Job:
    """Converts, verifies as configured, and says what was done.

    Raises:
        UserError: something is in the way; nothing was written.
        VerificationError: what was written is not what it should be.
    """
    started = time.monotonic()
    with prepared(config) as job, Programs(job.plan.recipes) as programs, _cleared(job):
        speaks = jax.process_index() == 0
        if speaks:
            for notice in (*job.source.notices, *job.plan.notices):
                print(f"note: {printable(notice)}", file=sys.stderr)
        with (
            liveness.all_or_none(),
            timeline.recorded() if config.trace else nullcontext() as spans,
        ):
            if job.there != "finished":
                _save(job, _begin(job, speaks), speaks, programs)
            if speaks:
                _finish(job)
            if job.publication is not None:
                distributed.once(job.publication.commit, patience=orbax.TIMEOUT_SECONDS)
            if spans is not None:
                _tell_time(config, spans, speaks)
        if speaks:
            print(_summary(job, time.monotonic() - started), flush=True)
        _verify(job, target.items(job.directory), speaks, programs)
    return job


def _tell_time(config: Config, spans: timeline.Timeline, speaks: bool) -> None:
    """Writes the timeline of this process, and says where its time went."""
    assert config.trace is not None
    path = Path(config.trace)
    if jax.process_count() > 1:
        path = path.with_stem(f"{path.stem}.{jax.process_index()}")
    spans.write(path, jax.process_index())
    if speaks:
        parts = (f"{kind} {duration(seconds)}" for kind, seconds in spans.seconds().items())
        print(f"time, over all threads: {', '.join(parts)}; for ui.perfetto.dev: {path}")


@contextmanager
def _cleared(job: Job) -> Iterator[None]:
    """Removes in the end what is on disk of a checkpoint that went to the Hub."""
    try:
        yield
    finally:
        if job.publication is not None and jax.process_index() == 0:
            job.publication.close()


def _begin(job: Job, speaks: bool) -> dict[str, Any]:
    """Makes the target ready; returns the leaves that an attempt before this one finished."""
    directory, kept = job.directory, dict[str, Any]()
    if job.there == "unfinished":
        distributed.once(partial(resume.keep, directory))
        kept = resume.finished(directory)
        if speaks and kept:
            print(f"note: {len(kept)} of {len(job.plan.leaves)} leaves are there", file=sys.stderr)
    if not kept:
        distributed.once(partial(target.clear, directory))
        distributed.once(partial(_leave_words, job, target.UNFINISHED_WORDS))
    if job.publication is not None:
        _begin_publication(job, job.publication, speaks)
    return kept


def _begin_publication(job: Job, going: publish.Publication, speaks: bool) -> None:
    with distributed.same_error_everywhere():
        if not (epath.Path(job.directory) / target.UNFINISHED_WORDS).exists():
            raise UserError(
                f"The processes do not share {going.scratch.parent}, where the checkpoint is put "
                f"together for {going.place}: set HF_HOME to a directory that all of them see, or "
                "convert to gs:// and upload from there."
            )
    with distributed.same_error_everywhere():
        for notice in going.begin() if speaks else ():
            print(f"note: {printable(notice)}", file=sys.stderr)


def _finish(job: Job) -> None:
    """Turns what was left for another attempt into words about the checkpoint."""
    directory = job.directory
    _leave_words(job, target.WORDS)
    (epath.Path(directory) / target.UNFINISHED_WORDS).unlink(missing_ok=True)
    resume.clear(directory)


def _save(job: Job, kept: Mapping[str, Any], speaks: bool, programs: Programs) -> None:
    """Saves the leaves; those that were `kept` are there already."""
    config = job.config
    leaves = tuple(leaf for leaf in job.plan.leaves if resume.name_of(leaf) not in kept)
    left = replace(job.plan, leaves=leaves)
    progress = orbax.Progress(total=sum(leaf.local_nbytes for leaf in leaves))
    with Engine(left, job.source, job.window, programs) as engine:

        def make(slabs: Sequence[Slab]) -> list[jax.Array]:
            if job.publication is not None:
                job.publication.wait_for_room(jax.process_index(), job.window)
            return engine.make_slabs(slabs)

        parts = _parts(left, make)

        def leaf(planned: LeafPlan) -> LazyTensor | jax.Array:
            lazy = _lazy(planned, parts.get(planned.name, ()))
            is_made = planned.name in parts and not config.lazy_load_tensors
            return lazy.load() if is_made else lazy

        with ProgressLine("written", lambda: (progress.written, progress.total), _told(speaks)):
            orbax.save(
                job.directory,
                orbax.train_state((p.leaf.path, leaf(p)) for p in job.plan.leaves),
                config.scan_layers,
                job.window // 2,
                progress,
                orbax.context(
                    config.checkpoint_storage_use_ocdbt,
                    config.checkpoint_storage_use_zarr3,
                    config.use_compression,
                    _file_bytes(job),
                ),
                kept,
                job.plan.model.metadata,
            )


def _file_bytes(job: Job) -> int:
    """An eighth of a slab, so that its data files are written side by side; on the Hub few do."""
    return orbax.FILE_BYTES if job.publication is not None else job.window // 32


def _parts(
    plan: Plan, make: Callable[[Sequence[Slab]], list[jax.Array]]
) -> Mapping[str, Sequence[Part]]:
    """The slabs of each leaf, for Orbax to ask for; when it does for one, its group is made."""
    parts: dict[str, list[Part]] = {}
    for number, group in enumerate(plan.groups):
        made = _Made(partial(make, [slab for _, slab in group]))
        for i, (leaf, slab) in enumerate(group):
            take = partial(made.take, i)
            part = LazyTensor(take, slab.shape, slab.dtype, leaf.name, slab.sharding, group=number)
            parts.setdefault(leaf.name, []).append((slab.in_leaf, part))
    return parts


class _Made:
    """What is made liveness, and taken one by one."""

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


def _verify(job: Job, saved: str, speaks: bool, programs: Programs | None = None) -> None:
    """Reads a checkpoint back and compares; VerificationError when it is not as it should be."""
    mode = job.config.verify
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
        ProgressLine("verified", lambda: (report.nbytes, total), _told(speaks)),
    ):
        whole = job.publication.whole if job.publication is not None else lambda item: item
        report = verify(saved, job.plan, engine, mode, job.window, say, whole)
    if not report.ok:
        raise VerificationError(saved, report.problems)
    if speaks:
        print(
            f"verified {report.leaves} of {len(job.plan.leaves)} leaves bit for bit against the "
            f"source in {duration(time.monotonic() - started)}"
        )


def _told(speaks: bool) -> TextIO | None:
    """Where progress is shown: one process does it for all."""
    return sys.stderr if speaks else None


def _summary(job: Job, took: float) -> str:
    plan, read, traffic = job.plan, job.source.stats.bytes_read, job.source.traffic
    if job.there == "finished":
        return f"saved before: {job.items}"
    asked = f" ({size(traffic.nbytes)} came, by {traffic.requests} requests)" * bool(
        traffic.requests
    )
    how = f"\nto train from it in MaxText: {_loaded_by(job)}"
    return (
        f"{len(plan.leaves)} leaves, {size(plan.output_nbytes)} in {duration(took)} "
        f"({size(plan.output_nbytes / took)}/s); this process read {size(read)}{asked}, and held "
        f"{size(peak_memory())} at most\nsaved: {job.items}"
    ) + ("" if job.config.adapter_alone else how)


def _loaded_by(job: Job) -> str:
    if job.publication is None:
        return f"load_parameters_path={job.items}"
    download = f"hf download {job.publication.name} --local-dir DIR"
    return f"{download}, then load_parameters_path={target.items('DIR')}"


def _leave_words(job: Job, name: str) -> None:
    """Says beside the checkpoint where it came from: for verify, --resume and people."""
    words = {"maxconv": __version__, "words": list(job.config.words), "identity": job.identity}
    directory = epath.Path(job.directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(json.dumps(words, indent=2) + "\n")


def verify_saved(checkpoint_path: str, words: Sequence[str]) -> None:
    """Verifies a checkpoint in full, by the words it was made with and those given now.

    Args:
        checkpoint_path: `<out>`, `<out>/0` or `<out>/0/items`.
        words: they win over those that the conversion left beside the checkpoint.
    """
    if publish.is_repository(checkpoint_path):
        raise UserError(
            f"{checkpoint_path} can be verified where it is downloaded: give the directory of "
            "`hf download org/name --local-dir DIR`."
        )
    saved = _saved_items(checkpoint_path)
    config = distributed.start([*_words_beside(saved), *words, "--verify=full"])
    with prepared(config, writes=False) as job:
        _verify(job, str(saved), jax.process_index() == 0)


def _saved_items(path: str) -> epath.Path:
    root = epath.Path(path if "://" in path else os.path.abspath(path))  # Orbax wants no less
    items = find_items(root / target.STEP) or find_items(root)
    if len(items) != 1:
        raise UserError(f"{path} is no MaxText checkpoint: there is no 0/items/_METADATA in it.")
    return items[0]


def _words_beside(items: epath.Path) -> list[str]:
    try:
        return json.loads((items.parent.parent / target.WORDS).read_text())["words"]
    except (OSError, ValueError, KeyError):
        return []
