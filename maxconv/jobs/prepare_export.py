"""Plans an export: which tensors of Hugging Face are made of which arrays, and in which files."""

import copy
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxconv.algebra.together import Stack
from maxconv.config import Config, model_facts
from maxconv.errors import UserError
from maxconv.jobs.prepare import STEP_MOST, check_outputs, opened_by_all, window_of
from maxconv.models.way_back import WayBack, way_back
from maxconv.planning.plan import Leaf, Plan, make_plan
from maxconv.processes.agreement import agree, gathered, same_error_everywhere
from maxconv.sources import FileSource, Source
from maxconv.sources.narrow import narrow
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource
from maxconv.targets import shards
from maxconv.targets.export_bucket import BucketExport
from maxconv.targets.export_directory import DirectoryExport
from maxconv.targets.export_hub import HubExport
from maxconv.targets.export_target import ExportTarget
from maxconv.targets.repository import is_repository
from maxconv.targets.shards import Contents, File, Tensor

_DTYPE_ENTRIES = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Export:
    """An export that is ready to start: everything is open and checked.

    Attributes:
        tree: the checkpoint.
        published: the model at Hugging Face whose names, shapes and files are taken.
        back: the tensors, and how they are made.
        stacks: by the name of their leaf in the plan.
        files: that will be written, by all processes.
        others: the contents of the small files beside them.
        target: where they go.
    """

    config: Config
    tree: TreeSource
    published: FileSource
    back: WayBack
    plan: Plan
    stacks: Mapping[str, Stack]
    files: Sequence[File]
    others: Mapping[str, bytes]
    notices: tuple[str, ...]
    window: int
    target: ExportTarget

    @property
    def mine(self) -> list[File]:
        """The files of this process."""
        return self.target.mine


@contextmanager
def prepared(config: Config, checkpoint: str) -> Iterator[Export]:
    """Plans an export, without reading any tensor; JAX must be initialized.

    Raises:
        UserError: with every problem that was found, the same on all processes.
    """
    with same_error_everywhere():
        tree = TreeSource(checkpoint, config.step)
    with tree, opened_by_all(config) as published:
        window = min(gathered(window_of(config)))
        with same_error_everywhere():
            export = _planned(config, tree, published, window)
        if jax.process_count() > 1:
            facts = {"the checkpoint": tree.root, "the plan": export.plan.digest}
            agree(facts, "start them in the same environment")
        with same_error_everywhere():
            check_outputs(config)
            _check_not_itself(export)
        export.target.check()
        yield export


def _planned(config: Config, tree: TreeSource, published: Source, window: int) -> Export:
    if not isinstance(published, FileSource):
        raise UserError("An export takes --hf_model_path from a directory, a bucket or the Hub.")
    facts = model_facts(config.model_name)
    axis = config.param_scan_axis
    back = way_back(tree, published, config.model_name, facts, config.overrides, axis)
    to = _checked_dtype(config, tree, back)
    dtypes = {name: _dtype(published, name, made, to) for name, made in back.dtypes.items()}
    plan = _plan(tree, back, dtypes, window)
    tensors = [
        Tensor(name, dtypes[name], stack.shape) for stack in back.stacks for name in stack.names
    ]
    for stored in map(published.stored.__getitem__, back.copied):
        tensors.append(Tensor(stored.name, stored.dtype, stored.shape))
    most = int(config.max_shard_size_gb * 1e9)
    files = shards.files(tensors, most, range(jax.process_count()))
    others, changes = _others(published, back, to)
    notices = (*published.notices, *back.notices, *_absent(published, back), *changes)
    stacks = {stack.names[0]: stack for stack in back.stacks}
    target = _target(config, Contents(files, others))
    return Export(
        config, tree, published, back, plan, stacks, files, others, notices, window, target
    )


def _target(config: Config, contents: Contents) -> ExportTarget:
    """Where the export goes."""
    where, overwrite, retries = config.base_output_directory, config.overwrite, config.max_retries
    if is_repository(where):
        token, public = config.hf_access_token, config.public
        return HubExport(where, contents, overwrite, token, retries, public)
    if where.startswith("gs://"):
        return BucketExport(where, contents, overwrite, retries)
    if "://" in where:
        raise UserError(
            f"{where} is not supported; give a directory, gs://bucket/path or hf://org/name."
        )
    return DirectoryExport(where, contents, overwrite)


def _plan(tree: TreeSource, back: WayBack, dtypes: Mapping[str, np.dtype], window: int) -> Plan:
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    grid = np.array(devices).reshape(jax.process_count(), -1)
    mesh = Mesh(grid, ("process", "local"))
    leaves = [
        Leaf(stack.names[0], stack.expr, narrow(dtypes[stack.names[0]]), _sharding(mesh, stack))
        for stack in back.stacks
    ]
    budget = min(window // 8, STEP_MOST)
    largest = max(info.chunk_nbytes for info in tree.tensors.values())
    tree.keep(2 * largest if largest > budget else 0)  # chunks that take several steps
    return make_plan(leaves, tree.tensors, mesh, budget, window // 4)


def _checked_dtype(config: Config, tree: TreeSource, back: WayBack) -> str | None:
    """The dtype that was asked for, None for the published ones.

    Raises:
        UserError: it is not possible, or scan_layers is not what the checkpoint has.
    """
    said = dict(word.split("=", 1) for word in config.words)
    if "scan_layers" in said and config.scan_layers != (back.scan_axis is not None):
        stacked = "not stacked" if back.scan_axis is None else "stacked"
        raise UserError(
            f"scan_layers={config.scan_layers}, but the layers of {tree.root} are {stacked}; "
            "remove it."
        )
    is_fp8 = config.save_dtype == "float8_e4m3fn"
    if "save_dtype" not in said or (is_fp8 and back.keeps_fp8):
        return None
    if is_fp8:
        raise UserError("--save_dtype=float8_e4m3fn: an export does not quantise; remove it.")
    if back.keeps_fp8:
        raise UserError(
            f"--save_dtype={config.save_dtype}: {tree.root} has fp8 weights with their scales, "
            "which are exported as they are; remove it."
        )
    return config.save_dtype


def _absent(published: FileSource, back: WayBack) -> Iterator[str]:
    """Sentences about the tensors that the checkpoint has nothing for."""
    if back.copied:
        yield f"not in the checkpoint, so copied from {published.root}: {some(back.copied)}"
    if back.left_out:
        yield f"not in the checkpoint, so left out: {some(back.left_out)}"


def _dtype(published: FileSource, name: str, made: np.dtype, wanted: str | None) -> np.dtype:
    """Of a tensor to write: the one that was asked for, or the published one."""
    stored = published.stored[name].dtype if name in published.stored else made
    is_as_published = narrow(stored) == made  # else it was quantised
    if wanted and made.kind not in "iub":
        return np.dtype(wanted)
    return stored if is_as_published else made


def _sharding(mesh: Mesh, stack: Stack) -> NamedSharding:
    """A copy on each process, divided among its devices along the longest axis that allows it."""
    local = mesh.shape["local"]
    axes = [axis for axis, n in enumerate(stack.expr.shape) if n % local == 0]
    longest = max(axes, key=lambda axis: stack.expr.shape[axis], default=None)
    entries = ["local" if axis == longest else None for axis in range(len(stack.expr.shape))]
    return NamedSharding(mesh, PartitionSpec(*entries))


def _others(
    published: FileSource, back: WayBack, to: str | None
) -> tuple[dict[str, bytes], list[str]]:
    """The small files of the model, and a sentence for each change in config.json."""
    contents = {name: published.content(name) for name in published.companions}
    config, changes = copy.deepcopy(published.config), list[str]()
    if config.pop("quantization_config", None) and not back.keeps_fp8:
        changes.append("config.json: quantization_config is taken out")
    levels = [config, *(part for part in config.values() if isinstance(part, dict))]
    for level, entry in itertools.product(levels if to else (), _DTYPE_ENTRIES):
        if level.get(entry, to) != to:
            changes.append(f"config.json: {entry} is {to} instead of {level[entry]}")
            level[entry] = to
    if changes:
        contents["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return contents, changes


def _check_not_itself(export: Export) -> None:
    """Raises UserError if the export would replace the model that its names are taken from."""
    where, model = export.target.place, export.published.root
    if where == model or (
        "://" not in where and os.path.realpath(where) == os.path.realpath(model)
    ):
        raise UserError(f"{where} is the model that names are taken from; name another place.")
