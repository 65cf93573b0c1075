"""Movement of data as one op: reshape, transpose, split and merge axes by a pattern.

A pattern names the atoms of each axis, einops style: `"(h t d) e -> e h (d t)"`. It is bound to a
shape once, into a canonical `Rearrange` over numbered atoms, so that two patterns which move data
in the same way are equal whatever their names.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from maxconv.algebra.boxes import Box, Shape, join, split, widen

Groups = tuple[tuple[int, ...], ...]  # the atoms of each axis, outermost first


class AlgebraError(ValueError):
    """An expression does not fit the shapes of its tensors, or does not cover them."""


@dataclass(frozen=True)
class Pattern:
    """An unbound movement. Widths that are not in `sizes` are inferred from the shape."""

    text: str
    sizes: tuple[tuple[str, int], ...] = ()

    def bind(self, shape: Shape) -> "Rearrange":
        """The canonical movement for an input of `shape`; raises AlgebraError when it can't fit."""
        return _bind(self, tuple(shape))

    @property
    def groups(self) -> tuple[list[list[str]], list[list[str]]]:
        """The atoms of each axis, before and after."""
        return _parse(self.text)

    def __str__(self) -> str:
        given = "".join(f", {name}={n}" for name, n in self.sizes)
        return f'"{self.text}"{given}'


def rearrange(pattern: str, **sizes: int) -> Pattern:
    """A movement such as `rearrange("(h d) e -> e h d", h=32)`."""
    return Pattern(pattern, tuple(sorted(sizes.items())))


@dataclass(frozen=True)
class Rearrange:
    """A bound movement: atoms are numbered in the order of the input and moved whole.

    No atom has size 1 and no two atoms stay neighbours on both sides, so equal movements are equal
    values. `sizes[i]` is the size of atom `i`.
    """

    lhs: Groups
    rhs: Groups
    sizes: Shape

    def bind(self, shape: Shape) -> "Rearrange":
        if tuple(shape) != self._in_shape:
            raise AlgebraError(f"{self} does not fit shape {tuple(shape)}")
        return self

    def _shape(self, side: Groups) -> Shape:
        return tuple(math.prod(self.sizes[a] for a in group) for group in side)

    @cached_property
    def _in_shape(self) -> Shape:
        return self._shape(self.lhs)

    @cached_property
    def _out_shape(self) -> Shape:
        return self._shape(self.rhs)

    def shape(self, s: Shape) -> Shape:
        return self._out_shape

    def is_identity(self, s: Shape) -> bool:
        return self.lhs == self.rhs

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        ranges = {}
        for group, interval in zip(self.rhs, box, strict=True):
            ranges.update(zip(group, split(interval, [self.sizes[a] for a in group]), strict=True))
        while True:  # until every axis of both sides is contiguous
            before = dict(ranges)
            for group in self.lhs + self.rhs:
                sizes = [self.sizes[a] for a in group]
                ranges.update(zip(group, widen([ranges[a] for a in group], sizes), strict=True))
            if ranges == before:
                return self._boxes(self.lhs, ranges), self._boxes(self.rhs, ranges)

    def _boxes(self, side: Groups, ranges: dict[int, tuple[int, int]]) -> Box:
        return tuple(
            join([ranges[a] for a in group], [self.sizes[a] for a in group]) for group in side
        )

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        local = [0] * len(self.sizes)
        for group, interval in zip(self.lhs, in_box, strict=True):
            ranges = split(interval, [self.sizes[a] for a in group])
            for a, (lo, hi) in zip(group, ranges, strict=True):
                local[a] = hi - lo
        atoms = [a for group in self.lhs for a in group]
        x = x.reshape([local[a] for a in atoms])
        x = x.transpose([atoms.index(a) for group in self.rhs for a in group])
        return x.reshape([math.prod(local[a] for a in group) for group in self.rhs])

    def inverse(self, s: Shape) -> "Rearrange":
        return _canonical(self.rhs, self.lhs, self.sizes)

    def then(self, other: "Rearrange") -> "Rearrange | None":
        """Both movements as one, or None when their atoms cut an axis in different places."""
        return _compose(self, other)

    def axis_kept(self, axis: int) -> int | None:
        """The output's axis that is this axis of the input, neither split nor merged; if any."""
        return self.rhs.index(self.lhs[axis]) if self.lhs[axis] in self.rhs else None

    def resized(self, axis: int, n: int) -> "Rearrange":
        """The same movement where an axis that is kept has another size."""
        (atom,) = self.lhs[axis]
        return _canonical(self.lhs, self.rhs, (*self.sizes[:atom], n, *self.sizes[atom + 1 :]))

    def __str__(self) -> str:
        def side(groups: Groups) -> str:
            words = (" ".join(_letter(a) for a in g) or "1" for g in groups)
            return " ".join(f"({w})" if " " in w else w for w in words)

        widths = " ".join(f"{_letter(a)}={n}" for a, n in enumerate(self.sizes))
        return f"[{side(self.lhs)} -> {side(self.rhs)} | {widths}]"


def _letter(atom: int) -> str:
    return chr(ord("a") + atom) if atom < 26 else f"a{atom}"


def _parse(text: str) -> tuple[list[list[str]], list[list[str]]]:
    sides = text.split("->")
    if len(sides) != 2:
        raise AlgebraError(f'pattern "{text}" must have exactly one "->"')
    lhs, rhs = (
        [[] if w == "1" else w.strip("()").split() for w in re.findall(r"\([^()]*\)|[^\s()]+", s)]
        for s in sides
    )
    left, right = sorted(sum(lhs, [])), sorted(sum(rhs, []))
    if left != right or len(set(left)) != len(left):
        raise AlgebraError(f'pattern "{text}" must name each atom once on each side')
    return lhs, rhs


@lru_cache(maxsize=4096)
def _bind(pattern: Pattern, shape: Shape) -> Rearrange:
    lhs, rhs = _parse(pattern.text)
    sizes = dict(pattern.sizes)
    misfit = AlgebraError(f"{pattern} does not fit shape {shape}")
    if len(lhs) != len(shape):
        raise misfit
    for group, n in zip(lhs, shape, strict=True):
        unknown = [a for a in group if a not in sizes]
        known = math.prod(sizes[a] for a in group if a in sizes)
        if len(unknown) > 1 or not known or n % known or (not unknown and n != known):
            raise misfit
        if unknown:
            sizes[unknown[0]] = n // known
    names = list(sizes)
    return _canonical(
        tuple(tuple(names.index(a) for a in group) for group in lhs),
        tuple(tuple(names.index(a) for a in group) for group in rhs),
        tuple(sizes.values()),
    )


@lru_cache(maxsize=4096)
def _canonical(lhs: Groups, rhs: Groups, sizes: Shape) -> Rearrange:
    """Drops atoms of size 1, joins atoms that stay neighbours, numbers them as the input does."""
    left, right = ([[a for a in group if sizes[a] != 1] for group in side] for side in (lhs, rhs))
    follows = {(a, b) for g in right for a, b in zip(g, g[1:], strict=False)}
    order = [a for group in left for a in group]
    head: dict[int, int] = {}  # each atom -> the first of the atoms it is joined with
    for group in left:
        for i, a in enumerate(group):
            joined = i > 0 and (group[i - 1], a) in follows
            head[a] = head[group[i - 1]] if joined else a
    heads = [a for a in order if head[a] == a]
    merged = [math.prod(sizes[b] for b in order if head[b] == a) for a in heads]

    def renumber(side: list[list[int]]) -> Groups:
        return tuple(tuple(heads.index(a) for a in group if head[a] == a) for group in side)

    return Rearrange(renumber(left), renumber(right), tuple(merged))


@lru_cache(maxsize=4096)
def _compose(first: Rearrange, second: Rearrange) -> Rearrange | None:
    pieces_1: dict[int, list[int]] = {}
    pieces_2: dict[int, list[int]] = {}
    sizes: list[int] = []
    for g1, g2 in zip(first.rhs, second.lhs, strict=True):
        if not _refine(g1, first.sizes, g2, second.sizes, pieces_1, pieces_2, sizes):
            return None
    lhs = tuple(tuple(p for a in g for p in pieces_1[a]) for g in first.lhs)
    rhs = tuple(tuple(p for a in g for p in pieces_2[a]) for g in second.rhs)
    return _canonical(lhs, rhs, tuple(sizes))


def _refine(
    g1: Sequence[int],
    sizes_1: Shape,
    g2: Sequence[int],
    sizes_2: Shape,
    pieces_1: dict[int, list[int]],
    pieces_2: dict[int, list[int]],
    sizes: list[int],
) -> bool:
    """Cuts one axis, factored in two ways, into pieces that both ways are made of."""
    todo_1, todo_2 = [[a, sizes_1[a]] for a in g1], [[a, sizes_2[a]] for a in g2]
    pieces_1.update({a: [] for a in g1})
    pieces_2.update({a: [] for a in g2})
    while todo_1 and todo_2:  # from the innermost atom outwards
        (a, n), (b, m) = todo_1[-1], todo_2[-1]
        size = min(n, m)
        if n % size or m % size:
            return False
        pieces_1[a].insert(0, len(sizes))
        pieces_2[b].insert(0, len(sizes))
        sizes.append(size)
        for todo, left in ((todo_1, n // size), (todo_2, m // size)):
            todo[-1][1] = left
            if left == 1:
                todo.pop()
    return not todo_1 and not todo_2
