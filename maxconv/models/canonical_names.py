"""Maps the canonical tensor names of a family's table to the tensors of a checkpoint.

Checkpoints of one architecture may use different names: `model.layers.0.mlp.up_proj.weight` is
`language_model.model.layers.0...` in some. The table uses canonical names, and the family lists the
alternatives. Quantised tensors are decoded by their codec.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product

import ml_dtypes
import numpy as np

from maxconv.algebra import (
    AlgebraError,
    Cast,
    Combine,
    Concat,
    Expr,
    Slice,
    Tensor,
    apply,
    nodes,
    rearrange,
    stack,
    tensors,
)
from maxconv.errors import UserError
from maxconv.families import Family
from maxconv.families.dims import MOST_EXPERTS
from maxconv.models.codecs import SCALE, decoded
from maxconv.models.lora import merged
from maxconv.models.stored_names import left_out, no_weights, unwrapped
from maxconv.models.unread import check_readable
from maxconv.sources import Source

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
KEPT = {FP8, np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)}

Names = Sequence[tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Logical:
    """A checkpoint's tensors by canonical name, and notices about how it was read."""

    tensors: Mapping[str, Expr]
    notices: tuple[str, ...] = ()


def logical_tensors(source: Source, family: Family, keep_fp8: bool = False) -> Logical:
    """The tensors of a checkpoint by canonical name, dequantised, with LoRA merged.

    `keep_fp8`: keep fp8 weights and their scales as separate tensors.

    Raises:
        UserError: the checkpoint is in a form that cannot be read, two tensors have the same
            canonical name, or packed tensors do not match.
    """
    check_readable(source)
    beside = source.adapter.tensors if source.adapter else ()
    useless = no_weights(source.tensors)
    out = set(beside).union(*useless.values())
    stored = {n: Tensor(n, x.shape) for n, x in source.tensors.items() if n not in out}
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    weights, notices = decoded(stored, source.config, keep_fp8, dtypes)
    rename, prefixes = unwrapped(family.names, weights)
    notices = (*notices, *left_out(useless), *prefixes)
    found: dict[str, Expr] = {}
    used: dict[str, str] = {}
    problems = []
    for name, weight in weights.items():
        ours, pattern = rename(name)
        if ours in found:
            other = next(tensors(found[ours])).name
            problems.append(f"{source.root}: {other} and {name} are the same tensor.")
        found[ours] = weight
        if pattern:
            used[pattern] = dict(family.names)[pattern]
    if problems:
        raise UserError(problems)
    if source.adapter is not None:
        if any(name.endswith(SCALE) for name in found):
            raise UserError(
                "An adapter cannot be merged into fp8 weights; add --save_dtype=bfloat16 to "
                "dequantise them."
            )
        found = merged(found, source.adapter, lambda name: rename(name)[0])
        notices = (*notices, f"the LoRA adapter {source.adapter.root} is merged into the weights")
    try:
        fused = fused_experts(split_experts(found, family), family.fuse_experts)
        found, n = transposed_experts(fused, family)
    except AlgebraError as error:
        raise UserError(f"{source.root}: {error}.") from None
    if n:
        notices = (*notices, f"the experts of {n} layers are stored transposed")
    renamed = (f"tensors {theirs}* are read as {ours}*" for theirs, ours in used.items())
    return Logical(found, (*notices, *renamed))


def fused_experts(weights: Mapping[str, Expr], fused: Names) -> dict[str, Expr]:
    """The weights, with those of single experts concatenated into one of all.

    `fused`: see `Family.fuse_experts`.
    """
    found = dict(weights)
    for whole, pieces in (*fused, *_of_scales(fused)):
        first = pieces[0].format(e=0)
        for layer in [name.removesuffix(first) for name in weights if name.endswith(first)]:
            experts: list[Expr] = []
            for e in count():
                names = [layer + piece.format(e=e) for piece in pieces]
                if not found.keys() >= set(names):
                    break
                parts = [found.pop(name) for name in names]
                experts.append(Concat(0, tuple(parts)) if len(parts) > 1 else parts[0])
            if experts:
                _add(found, layer + whole, stack(experts, 0))
    return found


def _of_scales(fused: Names) -> Iterator[tuple[str, tuple[str, ...]]]:
    for whole, pieces in fused:
        yield whole + SCALE, tuple(piece + SCALE for piece in pieces)


def split_experts(weights: Mapping[str, Expr], family: Family) -> dict[str, Expr]:
    """The weights, with fused ones split into the table's tensors for each expert.

    Raises:
        AlgebraError: a tensor does not have the shape of fused experts.
    """
    found = dict(weights)
    for whole, pieces in family.split_experts:
        for name in [name for name in weights if name.endswith(whole)]:
            fused, layer = found.pop(name), name.removesuffix(whole)
            if len(fused.shape) != 3 or fused.shape[1] % len(pieces) or not _is_filled(fused):
                raise AlgebraError(f"tensor {name} {fused.shape} is not a tensor of all experts")
            experts, n = fused.shape[0], fused.shape[1] // len(pieces)
            for e, (i, piece) in product(range(experts), enumerate(pieces)):
                one = apply(Slice(1, i * n, n), apply(Slice(0, e, 1), fused))
                _add(found, layer + piece.format(e=e), apply(rearrange("1 o i -> o i"), one))
    return found


def _is_filled(experts: Expr) -> bool:
    """Whether no axis is empty, and the number of experts is plausible."""
    return 0 not in experts.shape and experts.shape[0] <= MOST_EXPERTS


def _add(weights: dict[str, Expr], name: str, weight: Expr) -> None:
    """Adds a weight; AlgebraError if there is one of that name already."""
    if name in weights:
        one, other = (next(tensors(x)).name for x in (weights[name], weight))
        raise AlgebraError(f"{one} and {other} are the same tensor")
    weights[name] = weight


def transposed_experts(weights: Mapping[str, Expr], family: Family) -> tuple[dict[str, Expr], int]:
    """Transposes experts of (x, 2m, e) and (x, e, m) to (x, e, 2m) and (x, m, e).

    Returns:
        The weights, and the number of layers whose experts were transposed.
    """
    found, count = dict(weights), 0
    for fused, down in family.transposed_experts:
        for name in [name for name in weights if name.endswith(fused)]:
            other = name.removesuffix(fused) + down
            into, out = weights[name], weights.get(other)
            if out is None or len(into.shape) != 3 or len(out.shape) != 3:
                continue
            if into.shape[1:] == (2 * out.shape[2], out.shape[1]):
                for one in (name, other):
                    found[one] = apply(rearrange("x o i -> x i o"), weights[one])
                count += 1
    return found, count


def saved_dtype(expr: Expr, dtypes: Mapping[str, np.dtype], to: np.dtype) -> np.dtype:
    """The dtype in which MaxText saves an expression.

    Args:
        expr: the expression.
        dtypes: of the stored tensors, by name.
        to: --save_dtype. With float8_e4m3fn nothing is rounded: fp8, bfloat16 and float32 are kept,
            everything else becomes float32.
    """
    if to != FP8:
        return to
    kinds = {dtypes[t.name] for t in tensors(expr)}
    return kinds.pop() if len(kinds) == 1 and kinds <= KEPT else np.dtype(np.float32)


def rounded(weight: Expr, dtypes: Mapping[str, np.dtype], to: np.dtype) -> Expr:
    """A weight rounded to the dtype that is saved: MaxText rounds before it computes as well.

    Args:
        weight: one of `Logical.tensors`.
        dtypes: of the stored tensors, by name.
        to: --save_dtype.
    """
    to = saved_dtype(weight, dtypes, to)
    is_as_stored = {dtypes[t.name] for t in tensors(weight)} == {to}
    if is_as_stored and not _is_computed(weight):
        return weight
    return apply(Cast(to.name), weight)


def misfit(expr: Expr, dtypes: Mapping[str, np.dtype], to: np.dtype) -> str | None:
    """Why the dtypes of tensors do not fit a leaf, in a sentence; None if they do.

    Args:
        expr: the leaf.
        dtypes: of the tensors, by name.
        to: of the leaf.
    """
    for tensor in tensors(expr):
        dtype = dtypes[tensor.name]
        if dtype.kind in "bc":
            return f"tensor {tensor.name} is {dtype}, but weights are real numbers"
        if to.kind in "iu" and dtype.kind not in "iu":
            return f"tensor {tensor.name} is {dtype}, but the leaf in MaxText has integers"
    return None


def _is_computed(expr: Expr) -> bool:
    return any(isinstance(node, Combine) for node in nodes(expr))
