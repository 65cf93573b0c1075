"""Float32 arithmetic that comes out as IEEE 754 has it, also where a device flushes to zero.

XLA on CPUs and TPUs takes subnormal numbers (below 2^-126) for zero. numpy, and so MaxText's
converter, does not.
"""

from typing import Any

import numpy as np

_SIGN, _MAGNITUDE = np.uint32(1 << 31), np.uint32((1 << 31) - 1)
_EXPONENT = np.uint32(0x7F800000)
_HIGH_HALF = np.uint32(0xFFFFF000)  # a float32 without the lower half of its mantissa
_NORMAL = np.uint32(1 << 23)  # the bits of 2^-126
_UP, _DOWN = np.float32(2.0**100), np.float32(2.0**-100)
_UNITS = np.float32(2.0**49)  # of 2^-149, the smallest number, in what is scaled by 2^100


def times(x: Any, factor: float, wide: bool = False) -> Any:
    """The product of a float32 array, numpy's or JAX's, and a float32 of 2^-60 to 2^60.

    Small numbers are multiplied 2^100 times larger, and rounded to multiples of 2^-149 by hand.
    `wide`: the factor is a float64, as is the product before it is rounded.
    """
    xp, s = x.__array_namespace__(), np.float32(factor)
    tail = np.float32(np.abs(factor) - np.abs(np.float64(s))) if wide else np.float32(0)
    u = x.view(np.uint32)
    magnitude, sign = u & _MAGNITUDE, (u & _SIGN) ^ (np.float32(s).view(np.uint32) & _SIGN)
    a, s = magnitude.view(np.float32), np.abs(s)
    small = a < np.float32(2.0**-60)
    t = xp.where(magnitude < _NORMAL, magnitude.astype(np.float32) / _UNITS, a * _UP)
    t = xp.where(small, t, np.float32(0))
    product, error = _product(t, s, tail)
    units = product * _UNITS
    whole = xp.floor(units)
    rest, odd = units - whole, (whole.astype(np.uint32) & np.uint32(1)) == 1
    is_tie = rest == np.float32(0.5)
    up = (rest > np.float32(0.5)) | (is_tie & ((error > 0) | ((error == 0) & odd)))
    subnormal = whole.astype(np.uint32) + up.astype(np.uint32)
    scaled = xp.where(units < np.float32(2.0**24), subnormal, (product * _DOWN).view(np.uint32))
    large = _product(a, s, tail)[0] if tail else a * s
    return (xp.where(small, scaled, large.view(np.uint32)) | sign).view(np.float32)


def over(x: Any, divisor: float) -> Any:
    """The quotient of a float32 array and a positive float32 of 2^-60 to 2^60.

    XLA would multiply with the reciprocal. So do we, with one of 48 bits, and then look whether
    what is left is more than half a unit of the last place.
    """
    s = np.float32(divisor)
    quotient = times(x, 1 / float(np.float64(s)), wide=True)
    u, v = quotient.view(np.uint32), x.view(np.uint32)
    q, a = (u & _MAGNITUDE).view(np.float32), (v & _MAGNITUDE).view(np.float32)
    product = q * s
    left = (a - product) - _error(q, s, product)
    half = (u & _EXPONENT).view(np.float32) * np.float32(2.0**-24) * s
    is_large = (q > np.float32(2.0**-60)) & (q < np.float32(2.0**120)) & (a < np.float32(2.0**120))
    up = (is_large & (left > half)).astype(np.uint32)
    down = (is_large & (left < -half)).astype(np.uint32)
    return (u + up - down).view(np.float32)


def _product(t: Any, s: np.float32, tail: np.float32) -> tuple[Any, Any]:
    """The product of t and s + tail, and what rounding took from it."""
    product = t * s
    error = _error(t, s, product)
    if not tail:
        return product, error
    error = error + t * tail
    whole = t.__array_namespace__().where(product < np.inf, product + error, product)
    return whole, (product - whole) + error


def _error(t: Any, s: np.float32, product: Any) -> Any:
    """What rounding took from the product of t and s, exactly (Dekker 1971)."""
    high = (t.view(np.uint32) & _HIGH_HALF).view(np.float32)
    low = t - high
    s_high = (s.view(np.uint32) & _HIGH_HALF).view(np.float32)
    s_low = s - s_high
    return ((high * s_high - product) + high * s_low + low * s_high) + low * s_low
