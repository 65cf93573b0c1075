"""Prepares a conversion: opens the source, plans, and checks the target."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax

from maxconv import __version__
from maxconv.config import Config, model_facts
from maxconv.config.mesh import make_mesh
from maxconv.config.outputs import of_process, output_problem
from maxconv.config.tables import trained_models
from maxconv.errors import UserError
from maxconv.execution.tpu_compiler import chips
from maxconv.jobs import resume
from maxconv.jobs.leaves import conversion_leaves
from maxconv.jobs.memory import STEP_MOST, window_of
from maxconv.jobs.opening import check_same_everywhere, head_differs, opened_by_all
from maxconv.models.adapters import adapter_model
from maxconv.models.resolve import Model, resolve
from maxconv.models.training import Training, training
from maxconv.planning.plan import Plan, make_plan
from maxconv.planning.tpus import slice_of
from maxconv.processes.agreement import agree, gathered, same_error_everywhere
from maxconv.sources import AdaptedSource, Source, open_source
from maxconv.sources.transformers import TransformersSource
from maxconv.targets import completeness, orbax, place, publication
from maxconv.targets.base import Target
from maxconv.targets.hub import HubTarget
from maxconv.targets.maxtext import Format, MaxTextTarget
from maxconv.targets.publication import Publication
from maxconv.targets.repository import is_repository


@dataclass(frozen=True)
class Job:
    """A conversion that is ready to start: everything is open and checked."""

    config: Config
    source: Source
    model: Model
    plan: Plan
    notices: tuple[str, ...]
    """Sentences the user should see."""
    window: int
    identity: Mapping[str, str]
    target: Target
    training: Training | None = None
    """What MaxText is told to train it; None for an adapter alone."""
    there: Literal["nothing", "unfinished", "finished"] = "nothing"
    """How far an earlier attempt of this conversion got, if it is to be resumed."""
    name: str = "convert"
    """Of the job, as recorded in maxconv.json."""

    @property
    def items(self) -> str:
        """Where MaxText will find the weights."""
        return place.items(self.config.base_output_directory)

    @property
    def custom(self) -> dict[str, Any]:
        """MaxText's custom metadata in the checkpoint."""
        return {"scan_layers": self.config.scan_layers, **self.model.metadata}

    @property
    def record(self) -> dict[str, Any]:
        """How the checkpoint is made, as recorded in maxconv.json."""
        return {
            "maxconv": __version__,
            "job": self.name,
            "words": list(self.config.words),
            "identity": self.identity,
        }


@contextmanager
def prepared(config: Config, writes: bool = True) -> Iterator[Job]:
    """Plans a conversion, without reading any tensor; JAX must be initialized.

    The target is only checked if the job `writes` to it.

    Raises:
        UserError: with every problem that was found, the same on all processes.
    """
    check_planning(config, writes)
    with same_error_everywhere():
        check_outputs(config)
    with opened_by_all(partial(opened, config)) as source:
        check_same_everywhere(source)
        window = min(gathered(window_of(config)))  # hosts may differ, plans may not
        source.allow(window // 2)
        differs = not config.adapter_alone and head_differs(source, config.model_name)
        with same_error_everywhere():
            model, plan, notices = _planned(config, source, window, differs)
            train = None if config.adapter_alone else training_of(config, source, model)
            notices = (*notices, *(train.notices if train else ()))
        yield agreed("convert", config, source, model, plan, notices, window, train, writes)


def agreed(
    name: str,
    config: Config,
    source: Source,
    model: Model,
    plan: Plan,
    notices: tuple[str, ...],
    window: int,
    train: Training | None,
    writes: bool,
    empty: Mapping[str, Any] | None = None,
) -> Job:
    """The job, once all processes have the same plan, and its target is checked if it `writes`.

    `empty`: see `Format`.

    Raises:
        UserError: the plans differ, or the target cannot be written to.
    """
    mine = resume.identity(config, source, plan, window)
    if jax.process_count() > 1:
        agree({"the plan": plan.digest}, "start them in the same environment")
    same = gathered(mine)[0]  # local copies differ in their modification times
    form = replace(_format(config, model, window), empty=empty)
    target = MaxTextTarget(config.base_output_directory, form, config.overwrite)
    job = Job(config, source, model, plan, notices, window, same, target, train, name=name)
    with same_error_everywhere():
        return _with_target(job, form) if writes else job


def check_planning(config: Config, writes: bool) -> None:
    """Raises UserError if options of `maxconv plan` are given to a job that writes, or do not go
    together."""
    for option in ("export", "tpu_type", "report", "compile"):
        if writes and getattr(config, option):
            raise UserError(f"--{option} is only valid with `maxconv plan`; remove it.")
    if config.compile and config.tpu_type is None:
        raise UserError("--compile needs the type of slice: add, for example, --tpu_type=v5p-64.")


def check_outputs(config: Config) -> None:
    """Raises UserError if an output file, such as a report, must not be written."""
    index, count = jax.process_index(), jax.process_count()
    trace = config.trace and of_process(config.trace, index, count)
    report = config.report if index == 0 else None
    outputs = {"--trace": trace, "--report": report}
    found = (output_problem(option, path) for option, path in outputs.items() if path)
    if problems := [problem for problem in found if problem]:
        raise UserError(problems)


def _planned(
    config: Config, source: Source, window: int, head_differs: bool
) -> tuple[Model, Plan, tuple[str, ...]]:
    """The model, the plan, and notices for the user."""
    model = resolved(config, source, head_differs)
    mesh = make_mesh(config, devices_of(config))
    rules, axis = config.logical_axis_rules, config.scan_axis
    leaves, replicated = conversion_leaves(source, model, mesh, rules, axis, config.save_dtype)
    slab = window // 4 if config.lazy_load_tensors else math.inf
    plan = make_plan(leaves, source.tensors, mesh, min(window // 8, STEP_MOST), slab)
    return model, plan, (*source.notices, *model.notices, *replicated)


def training_of(config: Config, source: Source, model: Model) -> Training:
    """The arguments with which MaxText trains what is converted."""
    layout: dict[str, Any] = {"scan_layers": config.scan_layers}
    if config.scan_layers:
        layout["param_scan_axis"] = config.param_scan_axis
    return training(model, source.config, trained_models(), config.model_name, layout)


def _format(config: Config, model: Model, window: int) -> Format:
    # An eighth of a slab, so that data files are written concurrently; on the Hub, fewer files.
    to_hub = is_repository(config.base_output_directory)
    return Format(
        config.scan_layers,
        window // 2,
        config.checkpoint_storage_use_ocdbt,
        config.checkpoint_storage_use_zarr3,
        config.use_compression,
        orbax.FILE_BYTES if to_hub else window // 32,
        model.metadata,
    )


def devices_of(config: Config) -> Sequence[Any] | None:
    """The devices of --tpu_type; None for those of this job."""
    if config.tpu_type is None:
        return None
    on, num_slices = slice_of(config.tpu_type), max(config.num_slices, 1)
    return chips(on, num_slices) if config.compile else on.chips(num_slices)


def opened(config: Config, commit: str | None = None) -> Source:
    """Opens the checkpoint to convert; on the Hub, at `commit` if given."""
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
            raise UserError("Name the checkpoint to convert with --hf_model_path= or model_name=.")
        path = facts["hf_id"]
    if config.eager_load_method == "transformers" and not config.lazy_load_tensors:
        base = TransformersSource(path, config.revision, config.hf_access_token)
    else:
        base = open_part(path, config.revision, commit=commit)
    if adapter is None:
        return base
    return AdaptedSource(base, open_part(adapter, None, config="adapter_config.json"))


def resolved(config: Config, source: Source, head_differs: bool = False) -> Model:
    """Identifies the model of the checkpoint."""
    name, facts, words = config.model_name, model_facts(config.model_name), config.overrides
    if config.adapter_alone:
        return adapter_model(source, name, facts, words, config.scan_layers)
    keep_fp8 = config.save_dtype == "float8_e4m3fn"
    return resolve(source, name, facts, words, keep_fp8, head_differs)


def _with_target(job: Job, form: Format) -> Job:
    """The job with its target checked; UserError if it cannot be written to."""
    config, directory = job.config, job.config.base_output_directory
    if is_repository(directory):
        return replace(job, target=_hub_target(job, form))
    problems = place.problems(directory, job.plan.output_nbytes, config.overwrite)
    there = "nothing"
    looks = config.resume or place.is_renamed(directory)
    recorded, notices = resume.recorded(directory) if looks else (None, ())
    job = replace(job, notices=(*job.notices, *notices))
    if recorded is not None:
        differs = resume.problem(directory, recorded, job.identity)
        finished = place.is_there(directory)
        if finished and differs is None:
            leaves = [leaf.name for leaf in job.plan.leaves]
            if not (lost := completeness.problems(place.items(directory), leaves)):
                return replace(job, there="finished")
            problems = [*lost, *problems] if problems else []
        if config.resume and differs is not None and not finished:
            problems = [differs]
        can_move = "://" not in directory  # resuming moves files, and in buckets that is a copy
        may_resume = config.resume and can_move and not finished
        there = "unfinished" if differs is None and may_resume else "nothing"
    if problems:
        raise UserError(problems)
    return replace(job, there=there)


def _hub_target(job: Job, form: Format) -> Target:
    config, repository = job.config, job.config.base_output_directory
    problems: list[str] = []
    if jax.process_index() == 0:
        token = config.hf_access_token
        problems = publication.problems(repository, config.overwrite, config.public, token)
        if not problems:
            scratch = publication.scratch(repository)
            problems = place.scratch_problems(scratch, _scratch_nbytes(job))
    if problems:
        raise UserError(problems)
    retries, public = config.max_retries, config.public
    going = Publication(repository, config.hf_access_token, retries, public, config.overwrite)
    return HubTarget(going, form, job.window)


def _scratch_nbytes(job: Job) -> int:
    """Upper bound of the scratch space, over all processes, for a checkpoint that goes to the Hub.

    Each starts another slab while at most a window waits to be uploaded, and slabs of up to another
    window are being written.
    """
    if not job.config.lazy_load_tensors:
        return job.plan.output_nbytes
    largest = max(sum(slab.local_nbytes for _, slab in group) for group in job.plan.groups)
    bound = (2 * job.window + 2 * largest) * len(job.plan.processes)
    return min(bound, job.plan.output_nbytes)
