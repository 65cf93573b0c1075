"""Exports a MaxText checkpoint to Hugging Face: the way back, on the same planner and engine.

Tensors that are read together are made together, in steps of whole chunks: every process holds what
a step has made, and writes the parts of the tensors that are in its own files.
"""

import copy
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxconv.algebra import Box, dims, full
from maxconv.algebra.storage import blocks
from maxconv.algebra.together import Stack
from maxconv.config import Config, model_facts
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.execution.program import Programs
from maxconv.jobs.check_export import check
from maxconv.jobs.prepare import STEP_MOST, opened_by_all, window_of
from maxconv.jobs.reporter import Reporter
from maxconv.models.way_back import WayBack, way_back
from maxconv.planning.placement import local_boxes
from maxconv.planning.plan import Leaf, Plan, make_plan
from maxconv.planning.slabs import Slab
from maxconv.processes import liveness
from maxconv.processes.agreement import agree, gathered, once, same_error_everywhere, wait_for_all
from maxconv.sources import FileSource, Source
from maxconv.sources.narrow import narrow
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource
from maxconv.targets import shards
from maxconv.targets.base import Progress
from maxconv.targets.shards import File, Tensor, Writer
from maxconv.text import size

_DTYPE_ENTRIES = ("dtype", "torch_dtype")
PATIENCE = 24 * 3600  # seconds for the other processes to finish writing
_BLOCK = 16 << 20  # bytes of a tensor that are copied at once
_WRITERS = 4  # threads that copy to files


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

    @property
    def directory(self) -> Path:
        return Path(self.config.base_output_directory)

    @property
    def mine(self) -> list[File]:
        """The files of this process."""
        return [file for file in self.files if file.process == jax.process_index()]


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
            if jax.process_index() == 0 and (found := _problems(export)):
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
    return Export(config, tree, published, back, plan, stacks, files, others, notices, window)


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


def _problems(export: Export) -> list[str]:
    """Everything that prevents writing there, in sentences."""
    directory, given = export.directory, export.config.base_output_directory
    if "://" in given:
        return [f"{given} is not a directory; export to one, and copy it there."]
    if os.path.realpath(export.published.root) == os.path.realpath(directory):
        return [f"{directory} is the model that names are taken from; name another directory."]
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


def run(export: Export, reporter: Reporter) -> None:
    """Makes and writes every tensor, and verifies them as configured.

    Raises:
        VerificationError: a file differs from what numpy makes of the checkpoint.
    """
    started = time.monotonic()
    for notice in export.notices:
        reporter.note(notice)
    made = export.directory / shards.UNFINISHED
    with liveness.all_or_none(), liveness.unsaved():
        once(lambda: _clear(made))
        writer = Writer(made, export.mine)
        progress = Progress(total=sum(t.nbytes for file in export.mine for t in file.tensors))
        try:
            with (
                Programs(export.plan.recipes) as programs,
                Engine(export.plan, export.tree, export.window, programs) as engine,
                reporter.progress("written", lambda: (progress.written, progress.total)),
            ):
                _write(export, engine, writer, progress)
                _copy(export, writer, progress)
                writer.finish()
        finally:
            writer.close()
        wait_for_all("written", PATIENCE)
        once(lambda: shards.commit(export.directory, export.files, export.others))
        liveness.saved()
    tensors = [tensor for file in export.files for tensor in file.tensors]
    nbytes, seconds = sum(tensor.nbytes for tensor in tensors), time.monotonic() - started
    reporter.exported(str(export.directory), len(tensors), len(export.files), nbytes, seconds)
    if export.config.verify != "none":
        check(export, reporter)


def _clear(directory: Path) -> None:
    if directory.exists():
        for path in directory.iterdir():
            path.unlink()
    directory.mkdir(parents=True, exist_ok=True)


def _write(export: Export, engine: Engine, writer: Writer, progress: Progress) -> None:
    """Makes every slab in turn; while it is written, the next one is made."""
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        going: dict[Future[int], int] = {}

        def collect(most: int) -> None:
            while sum(going.values()) > most:
                done, _ = wait(going, return_when=FIRST_COMPLETED)
                for future in done:
                    del going[future]
                    progress.written += future.result()

        for group in export.plan.groups:
            arrays = engine.make_slabs([slab for _, slab in group])
            for (planned, slab), array in zip(group, arrays, strict=True):
                stack = export.stacks[planned.name]
                nbytes = slab.local_nbytes
                collect(max(0, export.window // 4 - nbytes))
                going[pool.submit(_written, stack, slab, array, writer)] = nbytes
            del arrays
        collect(0)


def _copy(export: Export, writer: Writer, progress: Progress) -> None:
    """Copies the published tensors of this process that the checkpoint has nothing for."""
    for name in filter(writer.has, export.back.copied):
        info = export.published.tensors[name]
        for box in blocks(full(info.shape), info.dtype.itemsize, _BLOCK):
            data = np.empty(dims(box), info.dtype)
            export.published.read(info, [(box, data)])
            progress.written += writer.write(name, box, data)


def _written(stack: Stack, slab: Slab, array: jax.Array, writer: Writer) -> int:
    """Writes what is in a slab of the tensors of this process; returns the bytes."""
    total = 0
    boxes = local_boxes(slab.sharding, slab.shape)
    distinct = {boxes[shard.device]: shard.data for shard in array.addressable_shards}
    for box, shard in distinct.items():
        data = np.asarray(shard)
        for name, within, part in _parts(stack, slab.in_leaf(box)):
            if writer.has(name):
                total += writer.write(name, part, data[within])
    return total


def _parts(stack: Stack, box: Box) -> Iterator[tuple[str, tuple[int, ...], Box]]:
    """For a box of a stack: each tensor in it, its place in the box, and the box of the tensor."""
    lanes, part = box[: len(stack.leading)], box[len(stack.leading) :]
    for within in np.ndindex(*dims(lanes)):
        place = tuple(lo + i for (lo, _), i in zip(lanes, within, strict=True))
        number = int(np.ravel_multi_index(place, stack.leading)) if place else 0
        yield stack.names[number], within, part
