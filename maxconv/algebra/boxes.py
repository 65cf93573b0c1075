"""Boxes: one half-open interval `(lo, hi)` per axis."""

import math
from collections.abc import Sequence

Shape = tuple[int, ...]
Interval = tuple[int, int]
Box = tuple[Interval, ...]


def full(shape: Sequence[int]) -> Box:
    """The box of a whole array."""
    return tuple((0, n) for n in shape)


def dims(box: Box) -> Shape:
    """The shape of what lies in a box."""
    return tuple(hi - lo for lo, hi in box)


def volume(box: Box) -> int:
    """Number of elements in a box."""
    return math.prod(dims(box))


def slices(box: Box, origin: Box | None = None) -> tuple[slice, ...]:
    """Indexes `box` in an array whose first element is the corner of `origin` (default: 0)."""
    starts = [lo for lo, _ in origin] if origin else [0] * len(box)
    return tuple(slice(lo - at, hi - at) for (lo, hi), at in zip(box, starts, strict=True))


def clip(box: Box, shape: Sequence[int]) -> Box:
    """The part of a box that lies inside an array of that shape (possibly empty)."""
    return tuple((min(lo, n), min(hi, n)) for (lo, hi), n in zip(box, shape, strict=True))


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes of the same rank have in common; None if nothing."""
    common = tuple((max(i, k), min(j, m)) for (i, j), (k, m) in zip(a, b, strict=True))
    return common if all(lo < hi for lo, hi in common) else None


def with_axis(box: Box, axis: int, interval: Interval) -> Box:
    """`box` with another interval on one axis."""
    return (*box[:axis], interval, *box[axis + 1 :])


def split(interval: Interval, sizes: Sequence[int]) -> list[Interval]:
    """Covers an interval of a composite axis by one range per atom, outermost first.

    The ranges are singles, then one proper range, then full ones, so their product is contiguous:
    the smallest such superset of the interval.
    """
    lo, hi = interval
    if lo == hi:
        return [(0, 0), *((0, n) for n in sizes[1:])]
    ranges: list[Interval] = []
    for i in range(len(sizes)):
        inner = math.prod(sizes[i + 1 :])
        first, last = lo // inner, (hi - 1) // inner
        ranges.append((first, last + 1))
        if first != last:
            return ranges + [(0, n) for n in sizes[i + 1 :]]
        lo, hi = lo - first * inner, hi - first * inner
    return ranges


def join(ranges: Sequence[Interval], sizes: Sequence[int]) -> Interval:
    """The interval of a composite axis that contiguous atom ranges (see `split`) make up."""
    lo = last = 0
    for (a, b), n in zip(ranges, sizes, strict=True):
        if a == b:
            return (0, 0)
        lo, last = lo * n + a, last * n + b - 1
    return (lo, last + 1)


def widen(ranges: Sequence[Interval], sizes: Sequence[int]) -> list[Interval]:
    """The smallest superset of atom ranges that is contiguous on its composite axis."""
    out: list[Interval] = []
    ranged = False
    for (a, b), n in zip(ranges, sizes, strict=True):
        out.append((0, n) if ranged and a < b else (a, b))
        ranged = ranged or b - a > 1
    return out
