"""What the arrays to load are over the tensors of a checkpoint, of Hugging Face or of MaxText."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from maxconv.algebra import Expr, Tensor
from maxconv.config.paths import read_path
from maxconv.errors import UserError
from maxconv.jobs.opening import head_differs, opened_by_all
from maxconv.jobs.recorded import recorded_axes, recorded_model
from maxconv.models import relayout, tree_sizes
from maxconv.models.canonical_names import FP8
from maxconv.models.described import DescribedModel, is_description
from maxconv.models.parameters import Expressions, parameters
from maxconv.models.resolve import Model, resolve
from maxconv.models.tree_model import TreeModel
from maxconv.models.tree_sizes import ROOT
from maxconv.processes.agreement import same_error_everywhere
from maxconv.sources import Source, open_source
from maxconv.sources.runs import has_tree
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource

Layout = Literal["maxtext", "hf"]
Path = tuple[str | int, ...]
Maker = Callable[[str, np.dtype], Expr]
"""What an array is, given its name and its dtype."""


@dataclass(frozen=True)
class Wanted:
    """A leaf to load: its place in the caller's tree, what is there, and the sharding it gets."""

    path: Path
    leaf: Any
    sharding: NamedSharding | SingleDeviceSharding

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.leaf.dtype)


def open_at(
    path: str, token: str | None, revision: str | None, commit: str | None = None
) -> Source:
    """Opens a checkpoint of MaxText or of Hugging Face, on the Hub at `commit` if given; or what a
    config.json describes."""
    if is_description(path):
        return DescribedModel(path)
    if has_tree(path):
        return TreeSource(path)
    return open_source(path, revision, token, commit=commit)


def maker(
    source: Source,
    wanted: Mapping[str, Wanted],
    layout: Layout,
    scan_axis: int,
    at: "ModelOf",
    rope_type: str | None = None,
) -> Maker:
    """What each array is over the tensors of a checkpoint.

    Args:
        source: the checkpoint.
        wanted: the arrays, by name.
        layout: see `maxconv.stream`.
        scan_axis: MaxText's param_scan_axis, if layers are stacked.
        at: opens the model at Hugging Face that a checkpoint of MaxText is of.
        rope_type: MaxText's, if it is not what the checkpoint of Hugging Face has by default.

    Raises:
        UserError: the checkpoint has not what is wanted.
    """
    if isinstance(source, DescribedModel):
        raise UserError(f"{source.root} has no weights; give the checkpoint that it belongs to.")
    if isinstance(source, TreeSource):
        return _of_tree(source, wanted, layout, scan_axis, at)
    return _of_hugging_face(source, wanted, layout, scan_axis, rope_type)


def _of_hugging_face(
    source: Source,
    wanted: Mapping[str, Wanted],
    layout: Layout,
    scan_axis: int,
    rope_type: str | None,
) -> Maker:
    differs = head_differs(source, None) if layout == "maxtext" else False
    with same_error_everywhere():
        if layout == "hf":
            return _as_stored(source, wanted)
        leaves = {name: one.leaf for name, one in wanted.items()}
        keeps_fp8 = any(one.dtype == FP8 for one in wanted.values())
        sizes = {**tree_sizes.parts(leaves), "rope_type": rope_type}
        model = resolve(source, None, None, sizes, keeps_fp8, head_differs=differs)
        _, axis = tree_sizes.layout(leaves, model, scan_axis)
        bound = {p.name.removeprefix(ROOT): p for p in parameters(model, source.root, axis)}
        _check_names(source.root, wanted, bound)
        expressions = Expressions(model, source)
        return lambda name, dtype: expressions.of(bound[name], FP8 if keeps_fp8 else dtype)


def _as_stored(source: Source, wanted: Mapping[str, Wanted]) -> Maker:
    """As `maker`, for what has the same names in the checkpoint."""
    _check_names(source.root, wanted, source.tensors)
    tensors = {name: Tensor(name, info.shape) for name, info in source.tensors.items()}
    return lambda name, dtype: tensors[name]


def _of_tree(
    tree: TreeSource,
    wanted: Mapping[str, Wanted],
    layout: Layout,
    scan_axis: int,
    at: "ModelOf",
) -> Maker:
    """As `maker`, of a checkpoint of MaxText, in whatever layout it is."""
    with same_error_everywhere():
        if layout == "hf":
            raise UserError(
                f'{tree.root} is a checkpoint of MaxText, which layout="hf" does not read; '
                "export it first."
            )
        leaves = {name: one.leaf for name, one in wanted.items()}
        stored = {name: info.shape for name, info in tree.tensors.items()}
        if all(stored.get(name) == tuple(leaf.shape) for name, leaf in leaves.items()):
            return _as_stored(tree, wanted)
    model, old_axis = identified(tree, at)
    with same_error_everywhere():
        rows = model.rows
        new_axis = scan_axis if tree_sizes.is_stacked(leaves, rows) else None
        moved = relayout.moved(rows, rows, stored, old_axis, new_axis).leaves
        expressions = {leaf.path: leaf.expr for leaf in moved}
        _check_names(tree.root, wanted, expressions)
        return lambda name, dtype: expressions[name]


def identified(tree: TreeSource, at: "ModelOf") -> tuple[Model, int | None]:
    """The model that a tree is of, and the axis along which its layers are stacked, if they are.

    Raises:
        UserError: the model is not known, or is another one.
    """
    with opened_by_all(partial(at, tree)) as published, same_error_everywhere():
        return TreeModel(tree, published).model(recorded_axes(tree))


ModelOf = Callable[[TreeSource, str | None], Source]
"""Opens the model at Hugging Face that a tree is of, at a commit if given."""


def model_of(
    tree: TreeSource,
    commit: str | None,
    path: str | None,
    token: str | None,
    revision: str | None,
) -> Source:
    """Opens the model at Hugging Face that a tree is of: at `path`, or as recorded beside the tree.

    Raises:
        UserError: it is not known.
    """
    recorded, its_revision = (path, None) if path else recorded_model(tree)
    if recorded is None:
        raise UserError(
            f"{tree.root} has another layout than abstract, or is of another model; say which "
            "model at Hugging Face it is of, with hf_model_path=."
        )
    return open_at(read_path(recorded), token, revision or its_revision, commit)


def _check_names(root: str, wanted: Iterable[str], there: Iterable[str]) -> None:
    if lost := sorted({*wanted} - {*there}):
        raise UserError(f"{root} has no {some(lost)}; leave them out of abstract.")
