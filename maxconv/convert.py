"""A conversion from beginning to end: source, plan, checks, save, verification."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TextIO

import jax
from etils import epath

from maxconv import (
    __version__,
    checkpoint,
    distributed,
    publish,
    resume,
    target,
    timeline,
    together,
)
from maxconv.adapters import adapter_model
from maxconv.compiled import chips
from maxconv.config import Config, model_facts
from maxconv.engine import Engine
from maxconv.errors import RetryableError, UserError, VerificationError
from maxconv.inspect import find_items
from maxconv.model import Model, resolve
from maxconv.plan import LeafPlan, Plan, make_plan
from maxconv.program import Programs
from maxconv.report import ProgressLine, duration, machine_memory, peak_memory, size
from maxconv.sharding import make_mesh
from maxconv.slabs import Slab
from maxconv.sources import AdaptedSource, Source, open_source
from maxconv.sources.transformers import TransformersSource
from maxconv.tpus import slice_of
from maxconv.verify import Report, leaves_to_check, verify

# Bytes of a process' window unless --max_host_memory_gb says otherwise: a part of the machine's
# memory, and no more than serves. On a CPU the devices' memory is the host's, too.
WINDOW_PART = 48
WINDOW_MOST = {"tpu": 4 << 30, "cpu": 512 << 20}
BASE = 768 << 20  # what Python, JAX and Orbax take by themselves, measured


@dataclass(frozen=True)
class Job:
    """A conversion that can start: everything is open and checked."""

    config: Config
    source: Source
    plan: Plan
    window: int
    identity: Mapping[str, str]
    there: Literal["nothing", "unfinished", "finished"] = "nothing"
    """What the target holds of this very conversion, if it is to be gone on with."""
    publication: publish.Publication | None = None
    """If it goes to the Hub."""

    @property
    def directory(self) -> str:
        """Where Orbax writes."""
        if self.publication is not None:
            return os.fspath(self.publication.scratch)
        return self.config.base_output_directory

    @property
    def items(self) -> str:
        """Where MaxText will find the weights."""
        return target.items(self.config.base_output_directory)


@contextmanager
def prepared(config: Config, writes: bool = True) -> Iterator[Job]:
    """Plans a conversion, without reading a tensor; JAX must be initialized.

    Raises:
        UserError: with everything that is in the way, the same on all processes. The target is
            only looked at when something `writes` to it.
    """
    for word in ("tpu_type", "report", "compile"):
        if writes and getattr(config, word):
            raise UserError(f"{word} is a word of maxconv plan: take it out to convert.")
    if config.compile and config.tpu_type is None:
        raise UserError("--compile asks the TPU compiler: say for which slice, --tpu_type=v5p-64.")
    with distributed.same_error_everywhere():
        source = opened(config)
    with source:
        _check_same_everywhere(source)
        window = min(distributed.gathered(_window(config)))  # hosts may differ, plans may not
        source.allow(window // 4)
        with distributed.same_error_everywhere():
            plan = make_plan(
                source,
                resolved(config, source),
                make_mesh(config, _devices(config)),
                config.logical_axis_rules,
                config.scan_axis,
                config.save_dtype,
                window // 8,
                window * 3 // 8 if config.lazy_load_tensors else math.inf,
            )
        # That of process 0: a copy of the source on another host has other times.
        same = distributed.gathered(resume.identity(config, source, plan))[0]
        job = Job(config, source, plan, window, same)
        with distributed.same_error_everywhere():
            if writes:
                job = _with_target(job)
        yield job


def _check_same_everywhere(source: Source) -> None:
    """Raises RetryableError when processes opened a source in a bucket or on the Hub differently.

    Copies on the disks of several hosts have times of their own, which say nothing.
    """
    seen = distributed.gathered(source.versions() if source.is_shared else {})
    if seen.count(seen[0]) < len(seen):
        raise RetryableError(
            f"{source.root} changed while it was opened; start again when nobody writes to it."
        )


def _devices(config: Config) -> Sequence[Any] | None:
    """Those to plan for, where they are not the ones that are here."""
    if config.tpu_type is None:
        return None
    on, num_slices = slice_of(config.tpu_type), max(config.num_slices, 1)
    return chips(on, num_slices) if config.compile else on.chips(num_slices)


def opened(config: Config) -> Source:
    """The checkpoint that is to be converted."""
    path = config.hf_model_path
    open_part = partial(
        open_source,
        token=config.hf_access_token,
        max_retries=config.max_retries,
        cache=config.cache,
    )
    adapter = config.hf_lora_adapter_path
    if adapter and config.adapter_alone:
        return open_part(adapter, config.revision, config="adapter_config.json")
    if path is None:
        facts = model_facts(config.model_name)
        if facts is None:
            raise UserError("Say which Hugging Face checkpoint: --hf_model_path=DIR.")
        path = facts["hf_id"]
    if config.eager_load_method == "transformers" and not config.lazy_load_tensors:
        base = TransformersSource(path, config.revision, config.hf_access_token)
    else:
        base = open_part(path, config.revision)
    if adapter is None:
        return base
    return AdaptedSource(base, open_part(adapter, None, config="adapter_config.json"))


def resolved(config: Config, source: Source) -> Model:
    """Which model the checkpoint is."""
    name, facts, words = config.model_name, model_facts(config.model_name), config.overrides
    if config.adapter_alone:
        return adapter_model(source, name, facts, words, config.scan_layers)
    return resolve(source, name, facts, words, config.save_dtype == "float8_e4m3fn")


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
                print(f"note: {notice}", file=sys.stderr)
        with (
            together.all_or_none(),
            timeline.recorded() if config.trace else nullcontext() as spans,
        ):
            if job.there != "finished":
                _save(job, _begin(job, speaks), speaks, programs)
            if speaks:
                _finish(job)
            if job.publication is not None:
                distributed.once(job.publication.commit, patience=checkpoint.TIMEOUT_SECONDS)
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


def _with_target(job: Job) -> Job:
    """The job, once its target was looked at; UserError when something is in the way there."""
    config, directory = job.config, job.config.base_output_directory
    if publish.is_repository(directory):
        return _with_publication(job)
    problems = target.problems(directory, job.plan.output_nbytes, config.overwrite)
    there = "nothing"
    if config.resume and (recorded := resume.recorded(directory)) is not None:
        differs = resume.problem(directory, recorded, job.identity)
        finished = target.is_there(directory)
        if finished and differs is None:
            return replace(job, there="finished")
        if differs is not None and not finished:
            problems = [differs]
        can_move = "://" not in directory  # what is kept is moved, which in a bucket is a copy
        there = "unfinished" if differs is None and can_move else "nothing"
    if problems:
        raise UserError(problems)
    return replace(job, there=there)


def _with_publication(job: Job) -> Job:
    config, place = job.config, job.config.base_output_directory
    problems: list[str] = []
    if jax.process_index() == 0:
        token = config.hf_access_token
        problems = publish.problems(place, config.overwrite, config.public, token)
        if not problems:
            problems = target.scratch_problems(publish.scratch(place), _scratch_nbytes(job))
    if problems:
        raise UserError(problems)
    going = publish.Publication(place, config.hf_access_token, config.max_retries, config.public)
    return replace(job, publication=going)


def _scratch_nbytes(job: Job) -> int:
    """What all processes have on disk at most of a checkpoint that goes to the Hub.

    Each starts to make a slab when no more than a window waits to be uploaded, and while the slabs
    of another window are being written.
    """
    if not job.config.lazy_load_tensors:
        return job.plan.output_nbytes
    largest = max(slab.local_nbytes for leaf in job.plan.leaves for slab in leaf.slabs)
    bound = (2 * job.window + 2 * largest) * len(job.plan.processes)
    return min(bound, job.plan.output_nbytes)


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
            print(f"note: {notice}", file=sys.stderr)


def _finish(job: Job) -> None:
    """Turns what was left for another attempt into words about the checkpoint."""
    directory = job.directory
    _leave_words(job, target.WORDS)
    (epath.Path(directory) / target.UNFINISHED_WORDS).unlink(missing_ok=True)
    resume.clear(directory)


def _save(job: Job, kept: Mapping[str, Any], speaks: bool, programs: Programs) -> None:
    """Saves the leaves; those that were `kept` are there already."""
    config, plan = job.config, job.plan
    left = tuple(leaf for leaf in plan.leaves if resume.name_of(leaf) not in kept)
    progress = checkpoint.Progress(total=sum(leaf.local_nbytes for leaf in left))
    with Engine(replace(plan, leaves=left), job.source, job.window, programs) as engine:

        def make(slab: Slab) -> jax.Array:
            if job.publication is not None:
                job.publication.wait_for_room(jax.process_index(), job.window)
            return engine.make_slab(slab)

        def leaf(planned: LeafPlan) -> checkpoint.LazyTensor | jax.Array:
            if not config.lazy_load_tensors and resume.name_of(planned) not in kept:
                return engine.make(planned)
            return _lazy(planned, make)

        with ProgressLine("written", lambda: (progress.written, progress.total), _told(speaks)):
            checkpoint.save(
                job.directory,
                checkpoint.train_state((p.leaf.path, leaf(p)) for p in plan.leaves),
                config.scan_layers,
                job.window - job.window // 4,
                progress,
                checkpoint.context(
                    config.checkpoint_storage_use_ocdbt,
                    config.checkpoint_storage_use_zarr3,
                    config.use_compression,
                ),
                kept,
                plan.model.metadata,
            )


def _lazy(leaf: LeafPlan, make: Callable[[Slab], jax.Array]) -> checkpoint.LazyTensor:
    def part(slab: Slab) -> checkpoint.LazyTensor:
        return checkpoint.LazyTensor(
            partial(make, slab), slab.shape, slab.dtype, leaf.name, slab.sharding
        )

    def whole() -> jax.Array:
        (slab,) = leaf.slabs
        return make(slab)

    parts = [(slab.in_leaf, part(slab)) for slab in leaf.slabs]
    return checkpoint.LazyTensor(whole, leaf.shape, leaf.dtype, leaf.name, leaf.sharding, parts)


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
        together.all_or_none(),
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


def _window(config: Config) -> int:
    """Bytes that a process may hold of what it reads, makes and writes."""
    if config.max_host_memory_gb is not None:
        window = int(config.max_host_memory_gb * 2**30) - BASE
    elif config.tpu_type is not None:
        window = min(slice_of(config.tpu_type).kind.host_ram // WINDOW_PART, WINDOW_MOST["tpu"])
    else:
        most = WINDOW_MOST.get(jax.default_backend(), WINDOW_MOST["cpu"])
        window = min(machine_memory() // WINDOW_PART, most)
    return max(window, 64 << 20)


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
