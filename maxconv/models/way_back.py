"""The way back: which tensors of Hugging Face the parameters of MaxText are, and how they are made.

The rules are the family's table, inverted. Names, shapes and dtypes are those of a checkpoint of
Hugging Face: the model as it was published, or the one that was converted.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxconv.algebra import (
    AlgebraError,
    Apply,
    Concat,
    Expr,
    Fit,
    Slice,
    Tensor,
    apply,
    invert,
    substitute,
    tensors,
)
from maxconv.algebra.together import Stack, stacks
from maxconv.errors import UserError
from maxconv.families import Parameter, number_after
from maxconv.families.dims import DECODER_LAYERS
from maxconv.models import tree_sizes
from maxconv.models.codecs import decoded
from maxconv.models.parameters import parameters
from maxconv.models.resolve import Model, resolve
from maxconv.models.stored_names import HEAD
from maxconv.models.tree_sizes import ROOT
from maxconv.sources import Source, TensorInfo
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource

_QUANTISED = "quantization_config"
_LAYERS = "base_num_decoder_layers"
_SIZES = (_LAYERS, "vocab_size")  # those that may differ from the published model's
_HEAD = "decoder.logits_dense.kernel"


@dataclass(frozen=True)
class WayBack:
    """What an export consists of.

    Attributes:
        model: that the tree is of.
        rules: each tensor, over the leaves of the tree.
        stacks: the same, over the leaves of the tree, together where they are read together.
        dtypes: of each tensor as published.
        keeps_fp8: whether fp8 weights stay as they are, with their scales.
        copied: published tensors that the tree has nothing for: encoders that were not trained,
            layers for multi-token prediction. They are taken as they are.
        completed: published tensors of which the last rows are taken, as the tree has none.
        left_out: those that cannot be: of a tied head, or quantised.
        scan_axis: along which layers are stacked in the tree; None if they are not.
        notices: sentences for the user.
    """

    model: Model
    rules: Mapping[str, Expr]
    stacks: tuple[Stack, ...]
    dtypes: Mapping[str, np.dtype]
    keeps_fp8: bool
    copied: tuple[str, ...]
    completed: tuple[str, ...]
    left_out: tuple[str, ...]
    scan_axis: int | None
    notices: tuple[str, ...]


class Unquantised(Source):
    """A checkpoint of Hugging Face as it would be without quantisation; it cannot be read."""

    def __init__(self, of: Source):
        super().__init__()
        self.root, self.revision, self.notices = of.root, of.revision, of.notices
        self.config = {key: value for key, value in of.config.items() if key != _QUANTISED}
        stored = {name: Tensor(name, info.shape) for name, info in of.tensors.items()}
        dtypes = {name: info.dtype for name, info in of.tensors.items()}
        weights, self.codecs = decoded(stored, of.config, False, dtypes)
        self.tensors = {name: _info(of, name, weight) for name, weight in weights.items()}

    def read(self, info: TensorInfo, parts: Sequence[Any]) -> None:
        raise OSError(f"{self.root} is used for its names; {info.name} is not read")

    def close(self) -> None:
        pass


def _info(source: Source, name: str, weight: Expr) -> TensorInfo:
    if isinstance(weight, Tensor):
        return source.tensors[weight.name]
    return TensorInfo(name, np.dtype("bfloat16"), weight.shape)


def way_back(
    tree: TreeSource,
    published: Source,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    scan_axis: int = 1,
) -> WayBack:
    """How the parameters of a tree become the tensors of a checkpoint.

    Args:
        tree: the checkpoint of MaxText.
        published: a checkpoint of Hugging Face with the names and shapes to write.
        name, facts, sizes: MaxText's model_name, its configuration, and sizes given as arguments,
            see `resolve`.
        scan_axis: MaxText's param_scan_axis, if layers are stacked.

    Raises:
        UserError: with everything in which the tree, the published model and the arguments differ.
    """
    keeps_fp8 = any(info.dtype.name.startswith("float8") for info in tree.tensors.values())
    plain = published if keeps_fp8 else Unquantised(published)
    model, axis = _model(tree, plain, keeps_fp8, name, facts or {}, sizes or {}, scan_axis)
    bound = parameters(model, published.root, axis)
    if problems := [*tree_sizes.differences(tree.tensors, bound, tree.root, published.root)]:
        raise UserError(problems)
    constants = sorted(p.name.removeprefix(ROOT) for p in bound if not p.tensors)
    back = _inverted(model, bound, published.root)
    dtypes = {tensor: plain.tensors[tensor].dtype for tensor in back}
    stored = {next(tensors(weight)).name: name for name, weight in model.tensors.items()}
    as_stored = {} if _codecs(plain) else published.tensors
    left = sorted(
        n for n in plain.tensors.keys() - back.keys() if not _is_beyond(stored.get(n, n), model)
    )
    copied = tuple(n for n in left if n in as_stored and stored.get(n, n) != HEAD)
    cut = {tensor: expr for tensor, expr in back.items() if _is_longer(expr)}
    back |= {n: _completed(n, expr) for n, expr in cut.items() if n in as_stored}
    told = _notices(model, constants, cut, as_stored, bool(_codecs(plain)))
    return WayBack(
        model=model,
        rules=back,
        stacks=tuple(_stacks(back, dtypes)),
        dtypes=dtypes,
        keeps_fp8=keeps_fp8,
        copied=copied,
        completed=tuple(n for n in cut if n in as_stored),
        left_out=tuple(sorted({*left} - {*copied})),
        scan_axis=axis,
        notices=(*plain.notices, *told),
    )


def _inverted(model: Model, bound: Iterable[Parameter], root: str) -> dict[str, Expr]:
    """Each tensor, over the leaves of the tree."""
    rules = {
        p.name.removeprefix(ROOT): substitute(p.expr, model.tensors) for p in bound if p.tensors
    }
    try:
        return invert(rules)
    except AlgebraError as error:
        raise UserError([f"{root}: {line}." for line in str(error).splitlines()]) from None


def _model(
    tree: TreeSource,
    plain: Source,
    keeps_fp8: bool,
    name: str | None,
    facts: Mapping[str, Any],
    sizes: Mapping[str, Any],
    scan_axis: int,
) -> tuple[Model, int | None]:
    """The model of a tree, and the axis along which its layers are stacked.

    Raises:
        UserError: with all that the tree, the published model and the arguments contradict.
    """
    leaves = tree.tensors
    shown = {**tree_sizes.parts(leaves), **sizes}

    def resolved(name: str | None, facts: Mapping[str, Any], given: Mapping[str, Any]) -> Model:
        return resolve(plain, name, facts, given, keeps_fp8, head_differs=_HEAD in leaves)

    try:
        model = resolved(name, facts, shown)
        count, axis = tree_sizes.layout(leaves, model, scan_axis)
        if count < model.dims.layers and _LAYERS not in sizes:
            shown[_LAYERS] = count // model.family.layers_per_block
            model = resolved(name, facts, shown)
        return model, axis
    except UserError as error:
        found = error.problems
    contradictions: list[str] = []
    try:  # without the tree, then without the arguments: each contradiction by itself
        resolved(name, facts, sizes)
    except UserError as error:
        contradictions += error.problems
    with suppress(UserError):
        model = resolved(None, {}, {key: shown[key] for key in shown if key not in _SIZES})
        _, axis = tree_sizes.layout(leaves, model, scan_axis)
        bound = parameters(model, plain.root, axis)
        contradictions += tree_sizes.differences(leaves, bound, tree.root, plain.root)
    raise UserError(contradictions or found)


def _is_beyond(name: str, model: Model) -> bool:
    """Whether a tensor is of a layer after those that the tree has."""
    number = number_after(name, DECODER_LAYERS)
    fewer = model.dims.layers < model.published.layers
    return fewer and number is not None and number >= model.dims.layers


def _is_longer(expr: Expr) -> bool:
    """Whether a tensor has rows that the tree has not."""
    return isinstance(expr, Apply) and isinstance(expr.op, Fit) and expr.op.n > (expr.op.was or 0)


def _completed(name: str, expr: Expr) -> Expr:
    """A tensor that is longer than what the tree has of it, with the published rows at its end."""
    match expr:
        case Apply(Fit(axis, n, int(was)), x):
            rows = apply(Slice(axis, was, n - was), Tensor(name, expr.shape))
            return Concat(axis, (x, rows))
    return expr


def _notices(
    model: Model,
    constants: Sequence[str],
    cut: Mapping[str, Expr],
    as_stored: Container[str],
    was_quantised: bool,
) -> Iterator[str]:
    if constants:
        yield f"left out, as Hugging Face has no such tensors: {some(constants)}"
    if model.dims.layers < model.published.layers:
        yield (
            f"the checkpoint has the first {model.dims.layers} of {model.published.layers} layers; "
            "the others are left out"
        )
    for name, expr in cut.items():
        rows = f"the last {expr.shape[0] - model.dims.vocab} rows of {name}"
        is_copied = name in as_stored
        yield f"{rows} are not in the checkpoint, so {'copied' if is_copied else 'zeros'}"
    if was_quantised:
        yield "weights are written in bfloat16, not quantised as they were published"


def _codecs(source: Source) -> bool:
    """Whether a checkpoint was quantised, and is taken as it would be without."""
    return isinstance(source, Unquantised) and bool(source.codecs)


def _stacks(back: Mapping[str, Expr], dtypes: Mapping[str, np.dtype]) -> Iterator[Stack]:
    """The tensors that are made together; all of a stack have one dtype."""
    by_dtype: dict[np.dtype, dict[str, Expr]] = {}
    for name, expr in back.items():
        by_dtype.setdefault(dtypes[name], {})[name] = expr
    for rules in by_dtype.values():
        yield from stacks(rules)
