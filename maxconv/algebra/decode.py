"""The ops that a packed checkpoint is decoded with. They have no inverse: packing is not ours."""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np

from maxconv.algebra.boxes import Box, Shape, with_axis
from maxconv.algebra.ops import Op
from maxconv.algebra.rearrange import AlgebraError


class _OneWay:
    def bind(self, shape: Shape) -> Any:
        return self

    def is_identity(self, s: Shape) -> bool:
        return False

    def inverse(self, s: Shape) -> Op:
        raise AlgebraError(f"{self} cannot be undone")


class _Elementwise(_OneWay):
    def shape(self, s: Shape) -> Shape:
        return s

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        return box, box


@dataclass(frozen=True)
class Cast(_Elementwise):
    """Rounds to a dtype, by its name: to nearest, ties to even."""

    dtype: str

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        wide = x.astype(np.float32)
        if isinstance(x, np.ndarray):
            return wide.astype(self.dtype)
        from jax import lax

        # XLA may drop a rounding that it sees undone by the next operation (excess precision), but
        # not one that is asked for by reduce_precision.
        info = ml_dtypes.finfo(self.dtype)
        return lax.reduce_precision(wide, info.nexp, info.nmant).astype(self.dtype)


@dataclass(frozen=True)
class Exp2(_Elementwise):
    """The power of two, in float32, that an exponent with bias 127 stands for (E8M0)."""

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        exponent = x.astype(np.uint32)
        smallest = np.uint32(1 << 22)  # 2^-127 is subnormal
        normal = exponent << np.uint32(23)
        return x.__array_namespace__().where(exponent == 0, smallest, normal).view(np.float32)


@dataclass(frozen=True)
class Repeat(_OneWay):
    """Each place of an axis `k` times, `n` in all: the last may come less often."""

    axis: int
    k: int
    n: int

    def bind(self, shape: Shape) -> "Repeat":
        bound = Repeat(self.axis % len(shape), self.k, self.n)
        if shape[bound.axis] != -(-self.n // self.k):
            raise AlgebraError(f"{self} does not fit shape {shape}")
        return bound

    def shape(self, s: Shape) -> Shape:
        return (*s[: self.axis], self.n, *s[self.axis + 1 :])

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        lo, hi = box[self.axis]
        first, last = lo // self.k, -(-hi // self.k)
        cover = (first * self.k, min(last * self.k, self.n))
        return with_axis(box, self.axis, (first, last)), with_axis(box, self.axis, cover)

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        lo, hi = out_box[self.axis]
        repeated = x.__array_namespace__().repeat(x, self.k, axis=self.axis)
        return repeated[(*[slice(None)] * self.axis, slice(0, hi - lo))]


@dataclass(frozen=True)
class Unpack(_OneWay):
    """The `per` numbers in each integer on the last axis, the lowest bits first.

    `code`: "fp4" is E2M1 (OCP Microscaling Formats 1.0), "int4" an integer with 8 added, "int8" one
    with 128 added.
    """

    per: int
    code: Literal["fp4", "int4", "int8"]

    @property
    def bits(self) -> int:
        return int(self.code[-1])

    def shape(self, s: Shape) -> Shape:
        return (*s[:-1], s[-1] * self.per)

    def pull(self, box: Box, s: Shape) -> tuple[Box, Box]:
        lo, hi = box[-1]
        first, last = lo // self.per, -(-hi // self.per)
        return (*box[:-1], (first, last)), (*box[:-1], (first * self.per, last * self.per))

    def run(self, x: Any, in_box: Box, out_box: Box) -> Any:
        xp, mask = x.__array_namespace__(), np.uint32((1 << self.bits) - 1)
        shifts = xp.arange(0, self.bits * self.per, self.bits, dtype=np.uint32)
        numbers = x.astype(np.uint32)[..., None] >> shifts & mask
        numbers = numbers.reshape(*x.shape[:-1], -1)
        if self.code != "fp4":
            return numbers.astype(np.float32) - np.float32(1 << self.bits - 1)
        sign, exponent, half = numbers >> 3, numbers >> 1 & 3, numbers & 1
        normal = (exponent + 126 << 23 | half << 22).view(np.float32)
        magnitude = xp.where(exponent == 0, half.astype(np.float32) / 2, normal)
        return xp.where(sign == 1, -magnitude, magnitude)
