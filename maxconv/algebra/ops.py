"""The unary ops beside `Rearrange`: cutting, fitting and scaling.

Every op answers these questions about an input of shape `s`:

* `bind(s)`: the op with everything that follows from `s` filled in, or AlgebraError;
* `is_identity(s)`: whether it changes nothing;
* `shape(s)`: the output's shape;
* `pull(box, s) -> (in_box, cover)`: the input that an output box needs, and the output box that
  this input really gives, a superset that the caller trims;
* `run(x, in_box, cover)`: the op on that input; `x` is a numpy or JAX array;
* `inverse(s)`: the op that undoes it.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from maxconv.algebra.arithmetic import over, times
from maxconv.algebra.boxes import Box, Shape, dims, with_axis
from maxconv.algebra.rearrange import AlgebraError


class Op(Protocol):
    """What expressions are made of; see the module's text."""

    def bind(self, shape: Shape) -> "Op": ...
    def is_identity(self, s: Shape) -> bool: ...
    def shape(self, s: Shape) -> Shape: ...
    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]: ...
    def run(self, x: Any, in_box: Box, out_box: Box) -> Any: ...
    def inverse(self, s: Shape) -> "Op": ...


class _Resizes:
    """Gives an axis another length."""

    axis: int
    n: int

    def is_identity(self, s: Shape) -> bool:
        return self.n == s[self.axis]

    def shape(self, s: Shape) -> Shape:
        return (*s[: self.axis], self.n, *s[self.axis + 1 :])


@dataclass(frozen=True)
class Slice(_Resizes):
    """`n` places of an axis from `start`; undone together with its siblings (see `invert`)."""

    axis: int
    start: int
    n: int

    def bind(self, shape: Shape) -> "Slice":
        bound = Slice(_axis(self, self.axis, shape), self.start, self.n)
        if self.start + self.n > shape[bound.axis]:
            raise AlgebraError(f"{self} reaches past shape {shape}")
        return bound

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        lo, hi = box[self.axis]
        return with_axis(box, self.axis, (lo + self.start, hi + self.start)), box

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        return x  # pulling did it

    def inverse(self, s: Shape) -> Op:
        raise NotImplementedError("a slice is undone with its siblings, by invert()")


@dataclass(frozen=True)
class Fit(_Resizes):
    """Makes an axis `n` long: rows of zeros are added at its end, or the rows past `n` are cut.

    `was` is the axis' length in the input, known once bound.
    """

    axis: int
    n: int
    was: int | None = None

    def bind(self, shape: Shape) -> "Fit":
        axis = _axis(self, self.axis, shape)
        if self.was not in (None, shape[axis]):
            raise AlgebraError(f"{self} does not fit shape {shape}")
        return Fit(axis, self.n, shape[axis])

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        lo, hi = box[self.axis]
        end = s[self.axis]
        return with_axis(box, self.axis, (min(lo, end), min(hi, end))), box

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        missing = dims(out_box)[self.axis] - x.shape[self.axis]
        if not missing:
            return x
        xp = x.__array_namespace__()
        rows = (*x.shape[: self.axis], missing, *x.shape[self.axis + 1 :])
        return xp.concat([x, xp.zeros(rows, x.dtype)], axis=self.axis)

    def inverse(self, s: Shape) -> "Fit":
        return Fit(self.axis, s[self.axis], self.n)


@dataclass(frozen=True)
class Affine:
    """`x * scale + shift` in float32; `undo` means `(x - shift) / scale`.

    Results are float32: they are rounded once, when the leaf is stored. `wide`: the scale has the
    bits of a float64, all of which count; else it is rounded to float32 first.
    """

    scale: float = 1.0
    shift: float = 0.0
    undo: bool = False
    wide: bool = False

    def bind(self, shape: Shape) -> "Affine":
        return self

    def is_identity(self, s: Shape) -> bool:
        return self.scale == 1 and self.shift == 0

    def shape(self, s: Shape) -> Shape:
        return s

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        return box, box

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        x = x.astype(np.float32)
        shift = np.float32(self.shift)
        if self.undo:
            x = x - shift if self.shift else x
            return over(x, self.scale) if self.scale != 1 else x
        x = times(x, self.scale, self.wide) if self.scale != 1 else x
        return x + shift if self.shift else x

    def inverse(self, s: Shape) -> "Affine":
        return Affine(self.scale, self.shift, not self.undo, self.wide)


def scale(by: float) -> Affine:
    """Times a factor, rounded to float32."""
    return Affine(scale=float(by))


def shift(by: float) -> Affine:
    """Plus a constant."""
    return Affine(shift=float(by))


def fit(axis: int, n: int) -> Fit:
    """An axis of exactly `n`: zeros are added at its end, or its end is cut."""
    return Fit(axis, n)


def _axis(op: object, axis: int, shape: Shape) -> int:
    if not -len(shape) <= axis < len(shape):
        raise AlgebraError(f"{op} does not fit shape {shape}")
    return axis % len(shape)
