"""Plans an export: which tensors of Hugging Face are made of which arrays, and in which files."""

import copy
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np

from maxconv.algebra.together import Stack
from maxconv.config import Config, model_facts
from maxconv.errors import UserError
from maxconv.jobs.export_arrays import Made
from maxconv.jobs.export_place import check_place, target_of
from maxconv.jobs.export_shares import Shares, planned, shares
from maxconv.jobs.memory import STEP_MOST, window_of
from maxconv.jobs.opening import check_same_everywhere, opened_by_all
from maxconv.jobs.prepare import check_outputs, check_planning, devices_of, opened
from maxconv.jobs.recorded import recorded_order, with_model
from maxconv.models.codecs import unquantised
from maxconv.models.fewer_layers import shorten
from maxconv.models.peft import peft_adapter
from maxconv.models.way_back import WayBack, stacked, way_back
from maxconv.planning.overread import calls
from maxconv.planning.plan import Plan
from maxconv.processes.agreement import agree, gathered, same_error_everywhere
from maxconv.sources import FileSource, Source, TensorInfo
from maxconv.sources.index import ADAPTER, STATED
from maxconv.sources.narrow import narrow
from maxconv.sources.safetensors import some
from maxconv.sources.trees import AdaptedTree, Tree, TreeSource, is_factor
from maxconv.targets import place, shards
from maxconv.targets.export_target import ExportTarget
from maxconv.targets.shards import File, Tensor

_DTYPE_ENTRIES = ("dtype", "torch_dtype")
_SHARD = 5 * 10**9  # bytes of a file, as of transformers


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
        target: where they go.
        finished: whether an earlier attempt has put everything there, if it is to be resumed.
    """

    config: Config
    tree: Tree
    published: FileSource
    back: WayBack
    plan: Plan
    stacks: Mapping[str, Stack]
    made: Mapping[str, Made]
    files: Sequence[File]
    others: Mapping[str, bytes]
    notices: tuple[str, ...]
    window: int
    target: ExportTarget
    finished: bool = False

    @property
    def mine(self) -> list[File]:
        """The files of this process."""
        return self.target.mine

    def files_of(self, process: int) -> list[File]:
        return self.target.contents.of(process)

    def read_nbytes(self, process: int) -> int:
        """Bytes that a process reads: whole chunks of arrays, and published tensors."""
        names = {t.name for file in self.files_of(process) for t in file.tensors}
        copied = names.intersection(self.back.copied)
        chunks = self.tree.decoded(calls(self.plan, process))
        return chunks + sum(self.copied(name).nbytes for name in copied)

    def copied(self, name: str) -> TensorInfo:
        """The published tensor that one which is only copied is."""
        return self.published.tensors[self.back.origins[name]]


@contextmanager
def prepared(config: Config, checkpoint: str, writes: bool = True) -> Iterator[Export]:
    """Plans an export, without reading any tensor; JAX must be initialized.

    The target is only checked if the job `writes` to it.

    Raises:
        UserError: with every problem that was found, the same on all processes.
    """
    check_planning(config, writes)
    with same_error_everywhere():
        tree = _opened(config, checkpoint)
        config, found = with_model(config, tree)
    with tree, opened_by_all(partial(opened, config)) as published:
        window = min(gathered(window_of(config)))
        with same_error_everywhere():
            export = _planned(config, tree, published, window)
        export = replace(export, notices=(*found, *export.notices))
        if jax.process_count() > 1:
            facts = {"the checkpoint": tree.root, "the plan": export.plan.digest}
            agree(facts, "start them in the same environment")
            for source in (tree, published):
                check_same_everywhere(source)
        with same_error_everywhere():
            if writes:
                check_outputs(config)
                check_place(export.target, export.published.root)
        finished = writes and export.target.check(config.resume)
        yield replace(export, finished=finished)


def _opened(config: Config, checkpoint: str) -> Tree:
    """The checkpoint, with the adapter that is to be merged into it."""
    tree = TreeSource(checkpoint, config.step)
    if config.lora_restore_path is None:
        return tree
    return AdaptedTree(tree, TreeSource(config.lora_restore_path))


def _planned(config: Config, tree: Tree, published: Source, window: int) -> Export:
    if not isinstance(published, FileSource):
        raise UserError("An export takes --hf_model_path from a directory, a bucket or the Hub.")
    facts = model_facts(config.model_name)
    axis = config.param_scan_axis
    name, names = config.model_name, config.names
    sizes = {**recorded_order(tree), **config.overrides}
    lora = {"lora_rank": config.lora_rank, "lora_alpha": config.lora_alpha}
    if all(map(is_factor, tree.tensors)):
        return _adapter(config, tree, published, window, lora)
    back = way_back(tree, published, name, facts, sizes, axis, names, lora)
    tree.put_beside(published, back.completed)
    to = _checked_dtype(config, tree, back)
    dtypes = {
        name: _dtype(published.stored[back.origins[name]].dtype, made, to)
        for name, made in back.dtypes.items()
    }
    others, changes = _others(published, back, to)
    told = (*_absent(published, back), *changes)
    notices = (*tree.notices, *published.notices, *back.notices, *told)
    files = _as_published(config, published, back, dtypes) if config.layout == "source" else []
    return _export(config, tree, published, back, dtypes, files, others, notices, window)


def _export(
    config: Config,
    tree: Tree,
    published: FileSource,
    back: WayBack,
    dtypes: Mapping[str, np.dtype],
    files: Sequence[File],
    others: Mapping[str, bytes],
    notices: tuple[str, ...],
    window: int,
) -> Export:
    """The export of tensors to files; if these are not settled, to those that divide them best."""
    made, copied = _tensors(published, back, dtypes)
    nbytes = {tensor.name: tensor.nbytes for tensor in copied}
    devices = devices_of(config) or jax.devices()
    owners = {tensor.name: file.process for file in files for tensor in file.tensors}
    shared = shares(back.stacks, dtypes, nbytes, tree.tensors, devices, owners)
    plan = _plan(tree, shared, window)
    most = config.max_shard_size or _SHARD
    files = files or shards.by_size([*made, *copied], most, shared.owners)
    stacks = {stack.names[0]: stack for stack in back.stacks}
    target = target_of(config, tree.root, files, others)
    return Export(
        *(config, tree, published, back, plan, stacks, shared.made),
        *(files, others, notices, window, target),
    )


def _tensors(
    published: FileSource, back: WayBack, dtypes: Mapping[str, np.dtype]
) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors that are made, and those that are copied."""
    made = [Tensor(name, dtypes[name], of.shape) for of in back.stacks for name in of.names]
    stored = {name: published.stored[back.origins[name]] for name in back.copied}
    return made, [Tensor(name, of.dtype, of.shape) for name, of in stored.items()]


def _as_published(
    config: Config, published: FileSource, back: WayBack, dtypes: Mapping[str, np.dtype]
) -> list[File]:
    """The files of the published model, with the tensors that are written instead."""
    made, copied = _tensors(published, back, dtypes)
    stored = {tensor.name: published.stored[back.origins[tensor.name]] for tensor in made + copied}
    where = {name: (origin.file, origin.offset) for name, origin in stored.items()}
    processes = {device.process_index for device in devices_of(config) or jax.devices()}
    return shards.as_stored(made + copied, where, sorted(processes))


def _adapter(
    config: Config,
    tree: Tree,
    published: FileSource,
    window: int,
    lora: Mapping[str, float | None],
) -> Export:
    """The export of a LoRA adapter alone, for PEFT."""
    facts = model_facts(config.model_name)
    base = config.hf_model_path or (facts or {}).get("hf_id") or published.root
    name, axis = config.model_name, config.param_scan_axis
    sizes = {**recorded_order(tree), **config.overrides}
    made = peft_adapter(tree, published, base, lora, name, facts, sizes, axis)
    of_all, by_dtype = tuple(stacked(made.rules, made.dtypes)), made.dtypes
    back = WayBack(
        *(made.model, made.rules, of_all, by_dtype),
        scan_axis=made.scan_axis,
        notices=made.notices,
    )
    to = _checked_dtype(config, tree, back)
    dtypes = {name: np.dtype(to) if to else made for name, made in by_dtype.items()}
    shapes = {name: expr.shape for name, expr in made.rules.items()}
    tensors = tuple(Tensor(name, dtypes[name], shapes[name]) for name in sorted(shapes))
    files = [File(shards.ADAPTER, 0, tensors)]
    others = {ADAPTER: (json.dumps(made.config, indent=2) + "\n").encode()}
    return _export(config, tree, published, back, dtypes, files, others, made.notices, window)


def _plan(tree: Tree, shared: Shares, window: int) -> Plan:
    budget = min(window // 8, STEP_MOST)
    names = {name for leaf in shared.by_one for name in leaf.tensors}
    chunked = (info for name in names if (info := tree.tensors[name]).chunk is not None)
    largest = max((info.chunk_nbytes for info in chunked), default=0)
    tree.keep(2 * largest if largest > budget else 0)  # chunks that take several steps
    return planned(shared, tree.tensors, budget, window // 4)


def _checked_dtype(config: Config, tree: Tree, back: WayBack) -> str | None:
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


def _dtype(stored: np.dtype, made: np.dtype, wanted: str | None) -> np.dtype:
    """Of a tensor to write: the one that was asked for, or the published one."""
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
    if config.pop(STATED, None):
        changes.append(f"config.json: {STATED} is taken out, as the files have the usual names")
    if not back.keeps_fp8 and (plain := unquantised(config)) != config:
        config = plain
        changes.append("config.json: quantization_config is taken out")
    levels = [config, *(part for part in config.values() if isinstance(part, dict))]
    for level, entry in itertools.product(levels if to else (), _DTYPE_ENTRIES):
        if level.get(entry, to) != to:
            changes.append(f"config.json: {entry} is {to} instead of {level[entry]}")
            level[entry] = to
    changes += shorten(config, back.model)
    if changes:
        contents["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return contents, changes
