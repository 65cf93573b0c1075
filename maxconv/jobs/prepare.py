"""A conversion that can start: its source, its plan, its target, all checked."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax

from maxconv.config import Config, model_facts
from maxconv.config.mesh import make_mesh
from maxconv.errors import RetryableError, UserError
from maxconv.execution.tpu_compiler import chips
from maxconv.jobs import resume
from maxconv.models.adapters import adapter_model
from maxconv.models.resolve import Model, resolve
from maxconv.planning.plan import Plan, make_plan
from maxconv.planning.tpus import slice_of
from maxconv.processes import start as distributed
from maxconv.report import machine_memory
from maxconv.sources import AdaptedSource, Source, open_source
from maxconv.sources.transformers import TransformersSource
from maxconv.targets import hub as publish
from maxconv.targets import place as target

# Bytes of a process' window unless --max_host_memory_gb says otherwise: a part of the machine's
# memory, and no more than serves. On a CPU the devices' memory is the host's, too.
WINDOW_PART = 48
WINDOW_MOST = {"tpu": 4 << 30, "cpu": 512 << 20}
STEP_MOST = 128 << 20  # bytes for a step: the TPU compiler takes minutes for much larger cells
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
    with _opened_by_all(config) as source:
        _check_same_everywhere(source)
        window = min(distributed.gathered(_window(config)))  # hosts may differ, plans may not
        source.allow(window // 2)
        with distributed.same_error_everywhere():
            plan = make_plan(
                source,
                resolved(config, source),
                make_mesh(config, _devices(config)),
                config.logical_axis_rules,
                config.scan_axis,
                config.save_dtype,
                min(window // 8, STEP_MOST),
                window // 4 if config.lazy_load_tensors else math.inf,
            )
        # That of process 0: a copy of the source on another host has other times.
        same = distributed.gathered(resume.identity(config, source, plan))[0]
        job = Job(config, source, plan, window, same)
        with distributed.same_error_everywhere():
            if writes:
                job = _with_target(job)
        yield job


def _opened_by_all(config: Config) -> Source:
    """The checkpoint, on the Hub at the commit that process 0 finds: revisions move on."""
    source = None
    with distributed.same_error_everywhere():
        if jax.process_index() == 0:
            source = opened(config)
    commit = distributed.gathered(source.revision if source else None)[0]
    with distributed.same_error_everywhere():
        return source or opened(config, commit)


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


def opened(config: Config, commit: str | None = None) -> Source:
    """The checkpoint that is to be converted; on the Hub at a commit, if that is known."""
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
        base = open_part(path, config.revision, commit=commit)
    if adapter is None:
        return base
    return AdaptedSource(base, open_part(adapter, None, config="adapter_config.json"))


def resolved(config: Config, source: Source) -> Model:
    """Which model the checkpoint is."""
    name, facts, words = config.model_name, model_facts(config.model_name), config.overrides
    if config.adapter_alone:
        return adapter_model(source, name, facts, words, config.scan_layers)
    return resolve(source, name, facts, words, config.save_dtype == "float8_e4m3fn")


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
    largest = max(sum(slab.local_nbytes for _, slab in group) for group in job.plan.groups)
    bound = (2 * job.window + 2 * largest) * len(job.plan.processes)
    return min(bound, job.plan.output_nbytes)


def _window(config: Config) -> int:
    """Bytes that a process may hold of what it reads, makes and writes."""
    if config.max_host_memory_gb is not None:
        window = int(config.max_host_memory_gb * 2**30) - BASE
    elif config.tpu_type is not None:
        window = min(slice_of(config.tpu_type).machine.ram // WINDOW_PART, WINDOW_MOST["tpu"])
    else:
        most = WINDOW_MOST.get(jax.default_backend(), WINDOW_MOST["cpu"])
        window = min(machine_memory() // WINDOW_PART, most)
    return max(window, 64 << 20)
