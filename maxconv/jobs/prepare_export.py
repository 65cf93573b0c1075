"""Plans an export: which tensors of Hugging Face are made of which arrays, and in which files."""

import copy
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np

from maxconv.algebra.together import Stack
from maxconv.config import Config, model_facts
from maxconv.errors import UserError
from maxconv.jobs.export_arrays import Made
from maxconv.jobs.export_shares import Shares, planned, shares
from maxconv.jobs.prepare import (
    STEP_MOST,
    check_planning,
    devices_of,
    opened,
    opened_by_all,
    window_of,
)
from maxconv.models.way_back import WayBack, way_back
from maxconv.planning.overread import calls
from maxconv.planning.plan import Plan
from maxconv.processes.agreement import agree, gathered, same_error_everywhere
from maxconv.sources import FileSource, Source
from maxconv.sources.narrow import narrow
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource
from maxconv.targets import place, shards
from maxconv.targets.shards import File, Tensor
from maxconv.text import size

_DTYPE_ENTRIES = ("dtype", "torch_dtype")


@dataclass(frozen=True)
class Export:
    """An export that is ready to start: everything is open and checked.

    Attributes:
        tree: the checkpoint.
        published: the model at Hugging Face whose names, shapes and files are taken.
        back: the tensors, and how they are made.
        stacks: by the name of their leaf in the plan.
        made: the arrays that they are made as, likewise.
        files: that will be written, by all processes.
        others: the contents of the small files beside them.
    """

    config: Config
    tree: TreeSource
    published: FileSource
    back: WayBack
    plan: Plan
    stacks: Mapping[str, Stack]
    made: Mapping[str, Made]
    files: Sequence[File]
    others: Mapping[str, bytes]
    notices: tuple[str, ...]
    window: int

    @property
    def directory(self) -> Path:
        return Path(self.config.base_output_directory)

    @property
    def mine(self) -> list[File]:
        """The files of this process."""
        return self.files_of(jax.process_index())

    def files_of(self, process: int) -> list[File]:
        return [file for file in self.files if file.process == process]

    def read_nbytes(self, process: int) -> int:
        """Bytes that a process reads: whole chunks of arrays, and published tensors."""
        names = {t.name for file in self.files_of(process) for t in file.tensors}
        copied = names.intersection(self.back.copied)
        chunks = self.tree.decoded(calls(self.plan, process))
        return chunks + sum(self.published.tensors[name].nbytes for name in copied)


@contextmanager
def prepared(config: Config, checkpoint: str, writes: bool = True) -> Iterator[Export]:
    """Plans an export, without reading any tensor; JAX must be initialized.

    The target is only checked if the job `writes` to it.

    Raises:
        UserError: with every problem that was found, the same on all processes.
    """
    check_planning(config, writes)
    with same_error_everywhere():
        tree = TreeSource(checkpoint, config.step)
    with tree, opened_by_all(partial(opened, config)) as published:
        window = min(gathered(window_of(config)))
        with same_error_everywhere():
            export = _planned(config, tree, published, window)
        if jax.process_count() > 1:
            facts = {"the checkpoint": tree.root, "the plan": export.plan.digest}
            agree(facts, "start them in the same environment")
        with same_error_everywhere():
            if writes and jax.process_index() == 0 and (found := _problems(export)):
                raise UserError(found)
        yield export


def _planned(config: Config, tree: TreeSource, published: Source, window: int) -> Export:
    if not isinstance(published, FileSource):
        raise UserError("An export takes --hf_model_path from a directory, a bucket or the Hub.")
    facts = model_facts(config.model_name)
    axis = config.param_scan_axis
    back = way_back(tree, published, config.model_name, facts, config.overrides, axis)
    to = _checked_dtype(config, tree, back)
    dtypes = {name: _dtype(published, name, made, to) for name, made in back.dtypes.items()}
    stored = map(published.stored.__getitem__, back.copied)
    copied = [Tensor(of.name, of.dtype, of.shape) for of in stored]
    sizes = {tensor.name: tensor.nbytes for tensor in copied}
    devices = devices_of(config) or jax.devices()
    shared = shares(back.stacks, dtypes, sizes, tree.tensors, devices)
    plan = _plan(tree, shared, window)
    tensors = [
        Tensor(name, dtypes[name], stack.shape) for stack in back.stacks for name in stack.names
    ]
    tensors += copied
    most = int(config.max_shard_size_gb * 1e9)
    files = shards.files(tensors, most, shared.owners)
    others, changes = _others(published, back, to)
    notices = (*published.notices, *back.notices, *_absent(published, back), *changes)
    stacks = {stack.names[0]: stack for stack in back.stacks}
    return Export(
        config, tree, published, back, plan, stacks, shared.made, files, others, notices, window
    )


def _plan(tree: TreeSource, shared: Shares, window: int) -> Plan:
    budget = min(window // 8, STEP_MOST)
    names = {name for leaf in shared.by_one for name in leaf.tensors}
    largest = max((tree.tensors[name].chunk_nbytes for name in names), default=0)
    tree.keep(2 * largest if largest > budget else 0)  # chunks that take several steps
    return planned(shared, tree.tensors, budget, window // 4)


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


def _others(
    published: FileSource, back: WayBack, to: str | None
) -> tuple[dict[str, bytes], list[str]]:
    """The small files of the model, and a sentence for each change in config.json."""
    names = [name for name in published.companions if name != place.WORDS]  # it may be an export
    contents = {name: published.content(name) for name in names}
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


def _problems(export: Export) -> list[str]:
    """Everything that prevents writing there, in sentences."""
    directory, given = export.directory, export.config.base_output_directory
    if "://" in given:
        return [f"{given} is not a directory; export to one, and copy it there."]
    if os.path.realpath(export.published.root) == os.path.realpath(directory):
        return [f"{directory} is the model that names are taken from; name another directory."]
    if any((directory / name).exists() for name in (place.STEP, place.UNFINISHED_WORDS)):
        return [f"{directory} is for a MaxText checkpoint; name another base_output_directory."]
    nearest = next(path for path in (directory, *directory.parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        return [f"{nearest} is not a directory that can be written to; name another one."]
    names = (*shards.weights(directory), *export.others, *(file.name for file in export.files))
    there = [name for name in names if (directory / name).exists()]
    if there and not export.config.overwrite:
        return [f"{directory} holds {there[0]}; add --overwrite to replace it, or name another."]
    needed = sum(file.nbytes for file in export.files)
    if (free := shutil.disk_usage(nearest).free) < needed:
        return [f"{nearest} has {size(free)} free, but the export needs {size(needed)}."]
    return []
