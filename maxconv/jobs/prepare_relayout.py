"""Plans a new layout of a MaxText checkpoint: the same parameters, as other leaves."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxconv.algebra import Tensor, map_tensors, tensors
from maxconv.config import Config, model_facts
from maxconv.config.mesh import make_mesh, partition_spec
from maxconv.errors import UserError
from maxconv.execution.memory import machine_memory
from maxconv.jobs.kept_chunks import keep_shared
from maxconv.jobs.memory import STEP_MOST, window_of
from maxconv.jobs.opening import check_same_everywhere, opened_by_all
from maxconv.jobs.prepare import (
    Job,
    agreed,
    check_outputs,
    check_planning,
    devices_of,
    opened,
    training_of,
)
from maxconv.jobs.recorded import recorded_axes, recorded_order, with_model
from maxconv.models import relayout
from maxconv.models.described import DescribedModel, is_description
from maxconv.models.parameters import check_scans
from maxconv.models.resolve import Model
from maxconv.models.tree_model import TreeModel
from maxconv.models.tree_sizes import ROOT
from maxconv.planning.plan import Leaf, Plan, make_plan
from maxconv.planning.tpus import slice_of
from maxconv.processes.agreement import gathered, same_error_everywhere
from maxconv.sources import Source
from maxconv.sources.runs import located
from maxconv.sources.safetensors import some
from maxconv.sources.trees import OPTIMIZER, TreeSource, is_fp8
from maxconv.targets import orbax, place
from maxconv.text import size


@contextmanager
def prepared(config: Config, checkpoint: str, writes: bool = True) -> Iterator[Job]:
    """Plans a new layout, without reading any tensor; JAX must be initialized.

    The target is only checked if the job `writes` to it.

    Raises:
        UserError: with every problem that was found, the same on all processes.
    """
    check_planning(config, writes)
    with same_error_everywhere():
        check_outputs(config)
        tree = TreeSource(checkpoint, config.step, whole=config.train_state)
        _check_place(config, tree)
        config, found = with_model(config, tree, "its sizes are compared with those")
    with tree, opened_by_all(partial(_published, config)) as published:
        for source in (tree, published):
            check_same_everywhere(source)
        window = min(gathered(window_of(config)))
        with same_error_everywhere():
            config, model, plan, notices = _planned(config, tree, published, window)
            train = training_of(config, published, model)
        notices = (*found, *tree.notices, *notices, *train.notices)
        config = replace(config, words=_settled(config, tree))
        empty = tree.empty if config.train_state else None
        yield agreed("relayout", config, tree, model, plan, notices, window, train, writes, empty)


def _settled(config: Config, tree: TreeSource) -> tuple[str, ...]:
    """The arguments, with what was found out instead of given: they say how to make the checkpoint
    again, and to a job that reads it which model it is of."""
    found = {
        "hf_model_path": config.hf_model_path,
        "revision": config.revision,
        "scan_layers": config.scan_layers,
        "param_scan_axis": config.scan_axis,
        "load_parameters_path": tree.root,
    }
    said = dict(word.split("=", 1) for word in config.words)
    if config.model_name is None:  # else the name says it
        found = {**recorded_order(tree), **found}
        found |= {"rope_type": said["rope_type"]} if "rope_type" in said else {}
    said |= {key: str(value) for key, value in found.items() if value is not None}
    return tuple(f"{key}={value}" for key, value in said.items())


def _published(config: Config, commit: str | None) -> Source:
    """Opens the model at Hugging Face, or what a config.json says of it."""
    path = config.hf_model_path
    if path is not None and is_description(path):
        return DescribedModel(path)
    return opened(config, commit)


def _check_place(config: Config, tree: TreeSource) -> None:
    """Raises UserError if the new checkpoint would replace the old one, or lie in it."""
    base = config.base_output_directory
    if place.overlaps(base, tree.root):
        raise UserError(
            f"base_output_directory={base} would replace {tree.root}, which is read, or lie in it; "
            "name another directory."
        )


@dataclass(frozen=True)
class _Group:
    """Leaves that have paths in MaxText's tree, and the rest of their names in common.

    Attributes:
        before, after: the rest of their names in the new checkpoint.
        names: in the source, by path.
        is_weights: whether they are the weights, not something of each weight.
    """

    before: str
    after: str
    names: dict[str, str]
    is_weights: bool

    def name(self, path: str) -> str:
        """Of the leaf at a path, in the new checkpoint."""
        return ".".join(filter(None, (self.before, path, self.after)))


def _planned(
    config: Config, tree: TreeSource, published: Source, window: int
) -> tuple[Config, Model, Plan, tuple[str, ...]]:
    """The config with what no argument names as the tree has it, the model, the plan, and notices
    for the user."""
    said = dict(word.split("=", 1) for word in config.words)
    name, facts = config.model_name, model_facts(config.model_name)
    sizes = {**recorded_order(tree), **config.overrides}
    known = TreeModel(tree, published, name, facts, sizes)
    was, old_axis = known.model(recorded_axes(tree))
    becomes = known.shorter(was)
    scans, along = (
        getattr(config, key) if key in said else None for key in ("scan_layers", "param_scan_axis")
    )
    axis = relayout.scan_axis(scans, along, old_axis)
    check_scans(becomes, axis)
    config = replace(config, scan_layers=axis is not None)
    config = config if axis is None else replace(config, param_scan_axis=axis)
    mesh, made, replicated = make_mesh(config, devices_of(config)), list[Leaf](), list[str]()
    wanted = _checked_dtype(config, tree) if "save_dtype" in said else None
    lost: list[str] = []
    for group in _groups(config, tree):
        shapes = {path: tree.tensors[name].shape for path, name in group.names.items()}
        found = relayout.moved(was.rows, becomes.rows, shapes, old_axis, axis)
        lost += (group.names[path] for path in found.lost)
        for one in found.leaves:
            leaf, whys = _leaf(config, tree, mesh, group, one, wanted)
            made.append(leaf)
            replicated += (f"{why}, so this axis is replicated there" for why in whys)
    made.sort(key=lambda leaf: orbax.order(leaf.name))
    budget = min(window // 8, STEP_MOST)
    plan = make_plan(made, tree.tensors, mesh, budget, window // 4)
    on = slice_of(config.tpu_type).machine.ram if config.tpu_type else machine_memory()
    again = keep_shared(tree, [plan], window // 2, on)
    metadata = {key: value for key, value in tree.custom.items() if key != "scan_layers"}
    notices = (*_notices(tree, was, becomes, lost), *again, *dict.fromkeys(replicated))
    return config, replace(becomes, metadata=metadata), plan, notices


def _checked_dtype(config: Config, tree: TreeSource) -> np.dtype:
    """The dtype that was asked for; UserError if weights cannot have it."""
    if config.save_dtype.startswith("float8"):
        raise UserError(f"--save_dtype={config.save_dtype}: nothing is quantised; remove it.")
    if any(map(is_fp8, tree.tensors.values())):
        raise UserError(
            f"--save_dtype={config.save_dtype}: {tree.root} has fp8 weights with their scales, "
            "which stay as they are; remove it."
        )
    return np.dtype(config.save_dtype)


def _groups(config: Config, tree: TreeSource) -> Iterable[_Group]:
    """The leaves of the tree: its weights; and of a training state also what belongs to each
    weight, and what does not.

    Raises:
        UserError: there is no training state, or one that MaxText's trainer does not write.
    """
    weights = {name: name for name in tree.tensors if name not in tree.beside}
    if not config.train_state:
        return [_Group(ROOT.rstrip("."), "", weights, True)]
    if not any(name.startswith(OPTIMIZER) for name in tree.beside):
        raise UserError(f"{tree.root} has no state of an optimizer; remove --train_state.")
    if not orbax.streams():
        raise UserError(f"--train_state is not supported here; {orbax.notices()[0]}")
    found: dict[tuple[str, str, bool], _Group] = {}
    for name in tree.tensors:
        at = located(tree.stored[name])
        is_weight = name in weights
        shape = tree.tensors[name].shape
        if at.path in weights and (shape != tree.tensors[at.path].shape):
            raise UserError(
                f"{name} in {tree.root} has shape {shape}, not that of its weight, so it cannot be "
                "laid out anew; remove --train_state."
            )
        if is_weight and at.path != name:
            raise UserError(
                f"{tree.root} was not saved by MaxText's trainer, which would have saved {name} as "
                f"params.params.{name}; remove --train_state."
            )
        key = (at.before, at.after, is_weight)
        found.setdefault(key, _Group(at.before, at.after, {}, is_weight)).names[at.path] = name
    return found.values()


def _leaf(
    config: Config,
    tree: TreeSource,
    mesh: Mesh,
    group: _Group,
    new: relayout.Leaf,
    wanted: np.dtype | None,
) -> tuple[Leaf, Sequence[str]]:
    """A leaf of the new checkpoint, and why axes of it are not sharded."""
    expr = map_tensors(new.expr, lambda of: Tensor(group.names[of.name], of.dims))
    (dtype, name), *others = {tree.tensors[of.name].dtype: of.name for of in tensors(expr)}.items()
    if wanted is not None and group.is_weights and dtype.kind not in "iub":
        dtype = np.dtype(new.dtype or wanted)
    elif others:
        other, of = others[0]
        mend = "give all a --save_dtype=" if group.is_weights else "remove --train_state"
        raise UserError(
            f"{name} in {tree.root} is {dtype}, but {of} is {other}, so they cannot be stacked; "
            f"{mend}."
        )
    spec, whys = partition_spec(
        new.logical, expr.shape, dict(mesh.shape), config.logical_axis_rules
    )
    return Leaf(group.name(new.path), expr, dtype, NamedSharding(mesh, spec)), whys


def _notices(tree: TreeSource, was: Model, becomes: Model, lost: Sequence[str]) -> Iterator[str]:
    if becomes.dims.layers < was.dims.layers:
        yield f"only the first {becomes.dims.layers} of {was.dims.layers} layers are taken"
    if lost:
        yield f"left out, as not every layer has it: {some(sorted(lost))}"
    left = [array for array in tree.unread if array.name != "step"]
    if any(array.name.startswith(OPTIMIZER) for array in left):
        roots = sorted({array.name.partition(".")[0] for array in left})
        yield (
            f"{', '.join(roots)} ({size(sum(array.nbytes for array in left))}) are left out; to "
            "take them along, add --train_state"
        )
