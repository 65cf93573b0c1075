"""Expressions that differ only in the place they take on an axis, as one expression of all.

Going back, each tensor is a slice of a leaf that holds many: layer 3 is `leaf[:, 3]`, transposed.
Together they are the leaf with that axis moved to the front, transposed: what is read for one of
them is read for all.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from maxconv.algebra.boxes import Shape
from maxconv.algebra.decode import Cast
from maxconv.algebra.expr import Apply, Combine, Concat, Expr, Fill, Tensor, apply
from maxconv.algebra.ops import Affine, Fit, Op, Slice
from maxconv.algebra.rearrange import AlgebraError, Pattern, Rearrange, rearrange


@dataclass(frozen=True)
class Stack:
    """Arrays of one shape, along leading axes.

    Attributes:
        names: of the arrays, in C order of the leading axes.
        first: the first of them.
        leading: lengths of the leading axes; empty for an array by itself.
        places: for each leading axis, from the last, which single places of `first`, in the order
            of `_unplaced`, it widens.
    """

    names: tuple[str, ...]
    first: Expr
    leading: Shape = ()
    places: tuple[frozenset[int], ...] = ()

    @property
    def shape(self) -> Shape:
        """Of each array."""
        return self.first.shape

    @cached_property
    def expr(self) -> Expr:
        """All of them, (*leading, *shape)."""
        return self.padded(self.leading)

    def padded(self, leading: Shape) -> Expr:
        """All of them, with anything after them where leading axes are to be longer.

        Raises:
            AlgebraError: they are not the last at a place, or are not moved only.
        """
        expr = self.first
        lengths = zip(self.places, reversed(self.leading), reversed(leading), strict=True)
        for of, n, to in lengths:  # the last is moved first, and ends innermost
            expr, _ = _Mover(of, n, to).move(expr)
        return expr


def stacks(rules: Mapping[str, Expr]) -> list[Stack]:
    """Rules of arrays, with those together that take their places of the same axes."""
    alike: dict[Expr, list[tuple[str, tuple[int, ...], Expr]]] = {}
    for name, expr in rules.items():
        starts: list[int] = []
        alike.setdefault(_unplaced(expr, starts), []).append((name, tuple(starts), expr))
    return [stack for found in alike.values() for stack in _stacked(found)]


def _stacked(found: Sequence[tuple[str, tuple[int, ...], Expr]]) -> Iterator[Stack]:
    """A single stack if places form a whole grid, else one for each array."""
    columns = [*zip(*(starts for _, starts, _ in found), strict=True)]
    axes = [*dict.fromkeys(column for column in columns if len(set(column)) > 1)]
    ranges = [range(min(axis), max(axis) + 1) for axis in axes]
    order = sorted(range(len(found)), key=lambda i: [axis[i] for axis in axes])
    grid = [tuple(axis[i] for axis in axes) for i in order]
    leading = tuple(map(len, ranges))
    if not axes or grid != [
        tuple(r.start + i for r, i in zip(ranges, at, strict=True)) for at in np.ndindex(*leading)
    ]:
        yield from (Stack((name,), expr) for name, _, expr in found)
        return
    places: list[frozenset[int]] = []
    for axis in reversed(axes):
        places.append(frozenset(at for at, column in enumerate(columns) if column == axis))
        columns = [column for column in columns if column != axis]
    yield Stack(tuple(found[i][0] for i in order), found[order[0]][2], leading, tuple(places))


def joined(expr: Expr) -> Expr:
    """The same, with consecutive places of an array, one after another, as one part of it.

    A stack of all that was taken out of another stack is that stack, its axes in another order.
    """
    match expr:
        case Concat(axis, parts):
            parts = tuple(map(joined, parts))
            found = stacks({str(i): part for i, part in enumerate(parts)})
            if len(found) > 1 or found[0].names != tuple(map(str, range(len(parts)))):
                return Concat(axis, parts)
            names = [f"x{i}" for i in range(len(parts[0].shape))]
            after = [*names[:axis], f"(n {names[axis]})", *names[axis + 1 :]]
            return apply(rearrange(f"n {' '.join(names)} -> {' '.join(after)}"), found[0].expr)
        case Apply(op, x):
            return apply(op, joined(x))
    return expr


def _unplaced(expr: Expr, starts: list[int]) -> Expr:
    """The expression with all single places at 0; theirs are appended to `starts`."""
    match expr:
        case Apply(Slice(axis, start, 1), x):
            starts.append(start)
            return Apply(Slice(axis, 0, 1), _unplaced(x, starts))
        case Apply(op, x):
            return Apply(op, _unplaced(x, starts))
        case Concat(axis, parts):
            return Concat(axis, tuple(_unplaced(part, starts) for part in parts))
        case Combine(op, parts):
            return Combine(op, tuple(_unplaced(part, starts) for part in parts))
    return expr


@dataclass
class _Mover:
    """Widens some of the single places of an expression to `n`, and moves their axis in front.

    `of`: which of them, in the order of `_unplaced`. `to`: how long the axis is to be.
    """

    of: Set[int]
    n: int
    to: int
    seen: int = 0

    def move(self, expr: Expr) -> tuple[Expr, bool]:
        """The new expression, and whether it has the axis in front."""
        match expr:
            case Apply(Slice(axis, start, 1), x):
                self.seen += 1
                is_one = self.seen - 1 in self.of
                x, moved = self.move(x)
                if not is_one:
                    return apply(Slice(axis + moved, start, 1), x), moved
                if moved:
                    raise AlgebraError(f"{expr} takes the same place twice")
                if self.to > self.n:
                    if start or x.shape[axis] != self.n:
                        raise AlgebraError(f"{expr} is not at the end of {x}")
                    x = _longer(x, axis, self.to)
                return apply(
                    _to_front(axis, len(x.shape)), apply(Slice(axis, start, self.to), x)
                ), True
            case Apply(op, x):
                x, moved = self.move(x)
                return apply(_deeper(op, self.to) if moved else op, x), moved
            case Concat(axis, parts):
                found = [self.move(part) for part in parts]
                if not any(moved for _, moved in found):
                    return Concat(axis, tuple(part for part, _ in found)), False
                return Concat(
                    axis + 1, tuple(x if m else self._repeated(x) for x, m in found)
                ), True
        return expr, False

    def _repeated(self, x: Expr) -> Expr:
        """A constant beside what has the axis in front."""
        if isinstance(x, Fill):
            return Fill((self.to, *x.shape), x.value)
        raise AlgebraError(f"{x} has no axis that could be moved")


def _longer(x: Expr, axis: int, n: int) -> Expr:
    """The same with more at the end of an axis: what is read past the end of its tensor."""
    match x:
        case Tensor():
            return apply(Fit(axis, n), x)
        case Apply(Affine() | Cast() as op, inner):
            return apply(op, _longer(inner, axis, n))
        case Apply(Slice() as op, inner) if op.axis != axis:
            return apply(op, _longer(inner, axis, n))
        case Apply(Rearrange() as op, inner):
            for was in range(len(inner.shape)):
                if op.lhs[was] and op.axis_kept(was) == axis:
                    return apply(op.resized(was, n), _longer(inner, was, n))
    raise AlgebraError(f"{x} cannot be followed by anything")


def _to_front(axis: int, rank: int) -> Pattern:
    names = [f"x{i}" for i in range(rank)]
    after = [*names[:axis], "1", *names[axis + 1 :]]
    return rearrange(f"{' '.join(names)} -> {names[axis]} {' '.join(after)}")


def _deeper(op: Op | Pattern, n: int) -> Op:
    """The same operation on arrays that have one more axis, of length n, in front."""
    match op:
        case Rearrange(lhs, rhs, sizes):
            ours, theirs = (
                ((0,), *(tuple(a + 1 for a in group) for group in side)) for side in (lhs, rhs)
            )
            return Rearrange(ours, theirs, (n, *sizes))
        case Slice() | Fit():
            return replace(op, axis=op.axis + 1)
        case Affine() | Cast():
            return op
    raise AlgebraError(f"{op} cannot be applied to several arrays at once")
