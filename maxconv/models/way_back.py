"""The way back: which tensors of Hugging Face the parameters of MaxText are, and how they are made.

The rules are the family's table, inverted. Names, shapes and dtypes are those of a checkpoint of
Hugging Face: the model as it was published, or the one that was converted.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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
    map_tensors,
    substitute,
    tensors,
)
from maxconv.algebra.together import Stack, stacks
from maxconv.errors import UserError
from maxconv.families import Parameter, number_after
from maxconv.families.dims import DECODER_LAYERS
from maxconv.models import tree_sizes
from maxconv.models.architecture import family_of
from maxconv.models.factors import merged_kernels, scaling_of
from maxconv.models.parameters import parameters
from maxconv.models.resolve import Model
from maxconv.models.stored_names import HEAD
from maxconv.models.tree_model import tree_model
from maxconv.models.tree_sizes import ROOT
from maxconv.models.views import as_stored, in_memory, unpacked
from maxconv.sources import Source
from maxconv.sources.safetensors import some
from maxconv.sources.trees import Tree, is_factor, is_fp8


@dataclass(frozen=True)
class WayBack:
    """What an export consists of.

    Attributes:
        model: that the tree is of.
        rules: each tensor, over the leaves of the tree.
        stacks: the same, over the leaves of the tree, together where they are read together.
        dtypes: of each tensor as published.
        keeps_fp8: whether fp8 weights stay as they are, with their scales.
        copied: tensors that the tree has nothing for: encoders that were not trained, layers for
            multi-token prediction. They are taken as they are published.
        origins: of each tensor, the name of a published one that it is, or that is a part of it.
        completed: published tensors of which the last rows are taken, as the tree has none.
        left_out: those that cannot be: of a tied head, or quantised.
        scan_axis: along which layers are stacked in the tree; None if they are not.
        notices: sentences for the user.
    """

    model: Model
    rules: Mapping[str, Expr]
    stacks: tuple[Stack, ...]
    dtypes: Mapping[str, np.dtype]
    keeps_fp8: bool = False
    copied: tuple[str, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)
    completed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    scan_axis: int | None = None
    notices: tuple[str, ...] = ()


def way_back(
    tree: Tree,
    published: Source,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    scan_axis: int = 1,
    names: str = "published",
    lora: Mapping[str, float | None] | None = None,
) -> WayBack:
    """How the parameters of a tree become the tensors of a checkpoint.

    Args:
        tree: the checkpoint of MaxText.
        published: a checkpoint of Hugging Face with the names and shapes to write.
        name, facts, sizes: MaxText's model_name, its configuration, and sizes given as arguments,
            see `resolve`.
        scan_axis: MaxText's param_scan_axis, if layers are stacked.
        names: "published", or "transformers": those that it has in memory.
        lora: lora_rank and lora_alpha of the factors in the tree, see `scaling_of`.

    Raises:
        UserError: with everything in which the tree, the published model and the arguments differ.
    """
    keeps_fp8 = any(map(is_fp8, tree.tensors.values()))
    plain = as_stored(published) if keeps_fp8 else unpacked(published)
    if names == "transformers":
        plain = in_memory(plain, published, family_of(published, facts))
    leaves = {leaf: info for leaf, info in tree.tensors.items() if not is_factor(leaf)}
    model, axis = tree_model(
        leaves, tree.root, plain, keeps_fp8, name, facts or {}, sizes or {}, scan_axis
    )
    bound = parameters(model, published.root, axis)
    if problems := [*tree_sizes.differences(leaves, bound, tree.root, published.root)]:
        raise UserError(problems)
    constants = sorted(p.name.removeprefix(ROOT) for p in bound if not p.tensors)
    back = _inverted(model, bound, published.root)
    dtypes = {tensor: plain.tensors[tensor].dtype for tensor in back}
    whole = {n for n, x in plain.weights.items() if isinstance(x, Tensor) and not plain.codecs}
    copied, left_out = _absent(model, plain.tensors.keys() - back.keys(), whole)
    origins = {name: next(tensors(weight)).name for name, weight in plain.weights.items()}
    cut = {tensor: expr for tensor, expr in back.items() if _is_longer(expr)}
    told = [*plain.notices, *_notices(model, constants, cut, whole, bool(plain.codecs))]
    if len(leaves) < len(tree.tensors):
        back = _adapted(back, tree, model, axis, lora or {})
        told.append("the LoRA adapter of MaxText is merged into the weights")
    back |= {n: _completed(origins[n], back[n]) for n in cut if n in whole}
    return WayBack(
        model=model,
        rules=back,
        stacks=tuple(stacked(back, dtypes)),
        dtypes=dtypes,
        keeps_fp8=keeps_fp8,
        copied=copied,
        origins=origins,
        completed=tuple(origins[n] for n in cut if n in whole),
        left_out=left_out,
        scan_axis=axis,
        notices=tuple(told),
    )


def _absent(
    model: Model, names: Iterable[str], whole: Container[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of published tensors that the tree has nothing for: those to copy, and those left out."""
    stored = {next(tensors(weight)).name: name for name, weight in model.tensors.items()}
    left = sorted(name for name in names if not _is_beyond(stored.get(name, name), model))
    copied = tuple(name for name in left if name in whole and stored.get(name, name) != HEAD)
    return copied, tuple(sorted({*left} - {*copied}))


def _inverted(model: Model, bound: Iterable[Parameter], root: str) -> dict[str, Expr]:
    """Each tensor, over the leaves of the tree."""
    rules = {
        p.name.removeprefix(ROOT): substitute(p.expr, model.tensors) for p in bound if p.tensors
    }
    try:
        return invert(rules)
    except AlgebraError as error:
        raise UserError([f"{root}: {line}." for line in str(error).splitlines()]) from None


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


def _adapted(
    back: Mapping[str, Expr],
    tree: Tree,
    model: Model,
    axis: int | None,
    said: Mapping[str, float | None],
) -> dict[str, Expr]:
    """Tensors over kernels that the adapter in the tree is merged into."""
    rank, alpha = scaling_of(tree, said)
    merged = merged_kernels(tree, model.rows, axis, alpha / rank)
    return {
        name: map_tensors(expr, lambda leaf: merged.get(leaf.name, leaf), apply)
        for name, expr in back.items()
    }


def stacked(back: Mapping[str, Expr], dtypes: Mapping[str, np.dtype]) -> Iterator[Stack]:
    """The tensors that are made together; all of a stack have one dtype."""
    by_dtype: dict[np.dtype, dict[str, Expr]] = {}
    for name, expr in back.items():
        by_dtype.setdefault(dtypes[name], {})[name] = expr
    for rules in by_dtype.values():
        yield from stacks(rules)
