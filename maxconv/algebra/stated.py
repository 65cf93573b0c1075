"""The shapes that a template states for its tensors, found backwards from the widths it names."""

import math
from collections.abc import Iterator, Sequence

from maxconv.algebra.expr import Apply, Combine, Concat, Expr, Tensor
from maxconv.algebra.ops import Fit, Slice
from maxconv.algebra.rearrange import Pattern

Extents = tuple[int | None, ...]  # None: not stated


def stated_shapes(template: Expr, shape: Extents | None = None) -> Iterator[tuple[str, Extents]]:
    """The name and the shape of each tensor of a template, as far as its operations state it.

    A slice states that its tensor is at least so long; where several slices make up a tensor, the
    longest is right. `shape`: of the template, if it is known.
    """
    match template:
        case Tensor(name):
            yield name, shape or ()
        case Apply(op, x):
            yield from stated_shapes(x, _before(op, shape))
        case Concat(_, parts):
            for part in parts:
                yield from stated_shapes(part)
        case Combine(_, parts):
            for part in parts:
                yield from stated_shapes(part, shape)


def _before(op: object, shape: Extents | None) -> Extents | None:
    """The shape of what an operation is applied to, given that of the result."""
    match op:
        case Pattern():
            before, after = op.groups
            sizes = dict(op.sizes)
            for atoms, n in zip(after, shape or (), strict=bool(shape)):
                left = [atom for atom in atoms if atom not in sizes and atom != "1"]
                if n is not None and len(left) == 1:
                    sizes[left[0]] = n // math.prod(sizes.get(atom, 1) for atom in atoms)
            return tuple(_width(atoms, sizes) for atoms in before)
        case Slice(axis, start, n) if shape is not None:
            return _with(shape, axis, start + n)
        case Fit(axis, n) if shape is not None:
            return _with(shape, axis, n)
    return shape


def _with(shape: Extents, axis: int, n: int) -> Extents:
    return tuple(n if i == axis % len(shape) else m for i, m in enumerate(shape))


def _width(atoms: Sequence[str], sizes: dict[str, int]) -> int | None:
    if any(atom not in sizes and atom != "1" for atom in atoms):
        return None
    return math.prod(sizes.get(atom, 1) for atom in atoms)
