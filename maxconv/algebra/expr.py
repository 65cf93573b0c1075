"""Expressions over named tensors, and binding them to shapes and layer numbers.

A family writes *templates*: `hf("layers.{l}.mlp.gate_proj.weight") >> rearrange("m e -> e m")`,
where `{l}` is a free index. `bind` turns a template into a bound expression: names are concrete,
every tensor has its shape, every op is canonical. A free index that is bound to a sequence of
numbers becomes a stack along an axis; bound to one number it just fills in the name. That is all
there is to scanned and unscanned layers.
"""

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union

import numpy as np

from maxconv.algebra.boxes import Box, Shape
from maxconv.algebra.decode import Cast
from maxconv.algebra.ops import Affine, Fit, Op, Slice
from maxconv.algebra.rearrange import AlgebraError, Pattern, Rearrange, rearrange

Expr = Union["Tensor", "Fill", "Apply", "Concat", "Combine"]


class _Node:
    def __rshift__(self, op: Op | Pattern | Sequence[Op | Pattern]) -> Expr:
        """`x >> op` applies an op, or several in a row."""
        node: Expr = self  # type: ignore[assignment]
        for one in [op] if not isinstance(op, Sequence) else op:
            node = Apply(one, node)
        return node


@dataclass(frozen=True)
class Tensor(_Node):
    """A named tensor; its shape is known once bound."""

    name: str
    dims: Shape | None = None

    @property
    def shape(self) -> Shape:
        if self.dims is None:
            raise AlgebraError(f"{self.name} is not bound to a shape")
        return self.dims


@dataclass(frozen=True)
class Fill(_Node):
    """A constant, without a source."""

    shape: Shape
    value: float


@dataclass(frozen=True)
class Apply(_Node):
    """An op applied to an expression."""

    op: Op | Pattern
    x: Expr

    @cached_property
    def shape(self) -> Shape:
        return self.op.bind(self.x.shape).shape(self.x.shape)


@dataclass(frozen=True)
class Concat(_Node):
    """Parts side by side on an axis. A stack is a concat of parts that have a unit axis there."""

    axis: int
    parts: tuple[Expr, ...]

    @cached_property
    def shape(self) -> Shape:
        first = self.parts[0].shape
        for part in self.parts:
            s = part.shape
            if len(s) != len(first) or _without(s, self.axis) != _without(first, self.axis):
                raise AlgebraError(
                    f"{_a_name(part)} gives {s} where {_a_name(self.parts[0])} gives {first}"
                )
        n = sum(part.shape[self.axis] for part in self.parts)
        return (*first[: self.axis], n, *first[self.axis + 1 :])

    def placed(self) -> Iterator[tuple[Expr, int, int]]:
        """Each part with the interval of the axis that it takes."""
        at = 0
        for part in self.parts:
            yield part, at, at + part.shape[self.axis]
            at += part.shape[self.axis]


@dataclass(frozen=True)
class Combine(_Node):
    """Bound expressions, computed with in float32.

    "times", "plus" and "minus": of parts of one shape. "matmul": of (*batch, n, k) and
    (*batch, k, m).
    """

    op: Literal["times", "plus", "minus", "matmul"]
    parts: tuple[Expr, ...]

    @cached_property
    def shape(self) -> Shape:
        first, *others = (part.shape for part in self.parts)
        if self.op == "matmul":
            *batch, k, m = others[0]
            if len(first) == len(others[0]) >= 2 and (*batch, k) == (*first[:-2], first[-1]):
                return (*first[:-1], m)
        elif all(other == first for other in others):
            return first
        shapes = " and ".join(str(part.shape) for part in self.parts)
        raise AlgebraError(f"{_a_name(self.parts[0])}: {self.op} of {shapes}")

    def pull(self, box: Box) -> list[Box]:
        """The box of each part that a box needs."""
        if self.op == "matmul":
            k = (0, self.parts[1].shape[-2])
            return [(*box[:-1], k), (*box[:-2], k, box[-1])]
        return [box] * len(self.parts)

    def run(self, xs: Sequence[Any]) -> Any:
        x, *others = (x.astype(np.float32) for x in xs)
        for y in others:
            match self.op:
                case "times":
                    x = x * y
                case "plus":
                    x = x + y
                case "minus":
                    x = x - y
                case "matmul":
                    x = _matmul(x, y)
        return x


def _matmul(x: Any, y: Any) -> Any:
    if isinstance(x, np.ndarray):
        return x @ y
    from jax import lax

    batch = tuple(range(x.ndim - 2))
    axes = ((x.ndim - 1,), (x.ndim - 2,)), (batch, batch)
    return lax.dot_general(x, y, axes, lax.Precision.HIGHEST)  # TPUs would round to bfloat16


def hf(name: str) -> Tensor:
    """A tensor of the Hugging Face checkpoint; `{l}`, `{e}` in its name are free indices."""
    return Tensor(name)


@dataclass(frozen=True)
class Stacked:
    """A free index that runs over `numbers`, stacked along `axis` (clamped to the part's rank).

    Numbers that are sequences themselves are stacks, too: their axis comes after the outer one.
    """

    numbers: Sequence[Any]
    axis: int

    def __iter__(self) -> "Iterator[int | Stacked]":
        for i in self.numbers:
            yield i if isinstance(i, int) else Stacked(i, self.axis)


def bind(
    template: Expr, shapes: Mapping[str, Shape], indices: Mapping[str, int | Stacked] | None = None
) -> Expr:
    """The bound form of a template.

    Args:
        template: an expression whose names may hold free indices.
        shapes: shape of every tensor, by concrete name.
        indices: a number, or `Stacked`, per free index. Stacks nest in the order given, the first
            outermost.

    Raises:
        AlgebraError: naming the tensor that is missing or does not fit.
    """
    if any(tensors(template)):  # a constant is stacked as what is beside it
        used = free_indices(template)
        indices = {k: v for k, v in (indices or {}).items() if k in used}
    indices = indices or {}
    for name, index in indices.items():
        if isinstance(index, Stacked):
            parts = [bind(template, shapes, {**indices, name: i}) for i in index]
            return stack(parts, index.axis)
    return _bind(template, shapes, indices)


def _bind(node: Expr, shapes: Mapping[str, Shape], numbers: Mapping[str, int | Stacked]) -> Expr:
    match node:
        case Tensor(name):
            concrete = name.format(**numbers)
            if concrete not in shapes:
                raise AlgebraError(f"tensor {concrete} is missing")
            return Tensor(concrete, tuple(shapes[concrete]))
        case Fill():
            return node
        case Concat(axis, parts):
            bound = Concat(axis, tuple(_bind(part, shapes, numbers) for part in parts))
            _ = bound.shape  # raises when the parts differ
            return bound
        case Combine(op, parts):
            combined = Combine(op, tuple(_bind(part, shapes, numbers) for part in parts))
            _ = combined.shape
            return combined
        case Apply(op, x):
            inner = _bind(x, shapes, numbers)
            try:
                return apply(op, inner)
            except AlgebraError as error:
                raise AlgebraError(f"{_a_name(inner)}: {error}") from None


def apply(op: Op | Pattern, x: Expr) -> Expr:
    """`op` of a bound expression, in canonical form.

    Identities vanish, neighbouring movements become one, arithmetic happens before movement (so
    that it runs over the tensor as it was read, in one pass), and movement and cuts within the
    parts of a stack. So expressions that say the same are equal, and a cell has as few steps as
    it can.
    """
    bound = op.bind(x.shape)
    if bound.is_identity(x.shape):
        return x
    if isinstance(x, Apply) and isinstance(x.op, Rearrange):
        if isinstance(bound, Affine | Cast):
            return Apply(x.op, apply(bound, x.x))
        if isinstance(bound, Rearrange) and (fused := x.op.then(bound)):
            return x.x if fused.is_identity(x.x.shape) else Apply(fused, x.x)
    if isinstance(bound, Fit) and isinstance(x, Apply) and isinstance(x.op, Cast):
        return Apply(x.op, apply(bound, x.x))  # so that it meets the tensor
    if isinstance(x, Concat) and isinstance(bound, Cast):
        return Concat(x.axis, tuple(apply(bound, part) for part in x.parts))
    if isinstance(x, Concat) and isinstance(bound, Slice):
        return _sliced(x, bound)
    if isinstance(bound, Rearrange) and isinstance(x, Concat) and bound.lhs[x.axis]:
        if (axis := bound.axis_kept(x.axis)) is not None:
            sizes = [part.shape[x.axis] for part in x.parts]
            parts = zip(x.parts, sizes, strict=True)
            return Concat(axis, tuple(apply(bound.resized(x.axis, n), p) for p, n in parts))
    return Apply(bound, x)


def _sliced(x: Concat, cut: Slice) -> Expr:
    """What is left of each part, without those of which nothing is."""
    if cut.axis != x.axis:
        return Concat(x.axis, tuple(apply(cut, part) for part in x.parts))
    parts = []
    for part, start, stop in x.placed():
        lo, hi = max(cut.start, start), min(cut.start + cut.n, stop)
        if lo < hi:
            parts.append(apply(Slice(cut.axis, lo - start, hi - lo), part))
    return parts[0] if len(parts) == 1 else Concat(x.axis, tuple(parts))


def stack(parts: Sequence[Expr], axis: int) -> Expr:
    """Bound parts of one shape along a new axis; one part alone just gets a unit axis."""
    if not parts:
        raise AlgebraError("there are too few layers to stack any here; say scan_layers=False")
    axis = min(axis, len(parts[0].shape))
    names = [f"x{i}" for i in range(len(parts[0].shape))]
    unit = rearrange(f"{' '.join(names)} -> {' '.join([*names[:axis], '1', *names[axis:]])}")
    stacked = Concat(axis, tuple(apply(unit, part) for part in parts))
    _ = stacked.shape  # raises when the parts differ
    return stacked if len(parts) > 1 else stacked.parts[0]


def substitute(expr: Expr, tensors: Mapping[str, Expr]) -> Expr:
    """A bound expression with other expressions, of the same shapes, in place of its tensors."""
    return map_tensors(expr, lambda tensor: tensors[tensor.name], apply)


def renamed(template: Expr, rename: Callable[[str], str]) -> Expr:
    """A template over tensors of other names."""
    return map_tensors(template, lambda tensor: Tensor(rename(tensor.name)))


def map_tensors(
    expr: Expr,
    to: Callable[[Tensor], Expr],
    applied: Callable[[Op | Pattern, Expr], Expr] = Apply,
) -> Expr:
    """An expression with others in place of its tensors; `applied` applies its operations again."""

    def parts_of(node: Concat | Combine) -> tuple[Expr, ...]:
        return tuple(map_tensors(part, to, applied) for part in node.parts)

    match expr:
        case Tensor():
            return to(expr)
        case Fill():
            return expr
        case Concat(axis):
            return Concat(axis, parts_of(expr))
        case Combine(op):
            return Combine(op, parts_of(expr))
        case Apply(op, x):
            return applied(op, map_tensors(x, to, applied))


def nodes(expr: Expr) -> Iterator[Expr]:
    """An expression and all parts that it is made of, outermost first, left to right."""
    left = [expr]
    while left:
        node = left.pop()
        yield node
        match node:
            case Apply(_, x):
                left.append(x)
            case Concat(_, parts) | Combine(_, parts):
                left += reversed(parts)


def tensors(expr: Expr) -> Iterator[Tensor]:
    """The tensors of an expression, left to right, with repeats."""
    return (node for node in nodes(expr) if isinstance(node, Tensor))


def free_indices(expr: Expr) -> set[str]:
    """The free indices in the names of a template's tensors."""
    names = (t.name for t in tensors(expr))
    return {field for n in names for _, field, _, _ in string.Formatter().parse(n) if field}


def _without(shape: Shape, axis: int) -> Shape:
    return shape[:axis] + shape[axis + 1 :]


def _a_name(expr: Expr) -> str:
    return next((t.name for t in tensors(expr)), "a constant")
