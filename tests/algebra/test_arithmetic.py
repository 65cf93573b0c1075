import jax
import ml_dtypes
import numpy as np
import pytest

from maxconv.algebra.arithmetic import times

FACTORS = [1 / np.sqrt(n) for n in (10, 64, 72, 80, 96, 128, 256)] + [
    np.sqrt(2304),
    -1 / np.sqrt(11),
    2.0,
]


def product(x, factor, wide=False):
    with np.errstate(all="ignore"):  # of numbers that are not numbers
        return (x * np.float64(factor)).astype(np.float32) if wide else x * np.float32(factor)


@pytest.mark.parametrize("factor", FACTORS)
def test_every_bfloat16(factor):
    x = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    x = x[~np.isnan(x)]
    want = product(x, factor)
    got = np.asarray(jax.jit(lambda x: times(x, factor))(x))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(times(x, factor).view(np.uint32), want.view(np.uint32))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("factor", FACTORS)
def test_random_and_small_float32(factor, wide):
    random = np.random.default_rng(0)
    bits = np.concatenate(
        [
            random.integers(0, 1 << 32, 1 << 18, np.uint32),
            random.integers(0, 1 << 27, 1 << 20, np.uint32),  # below 2^-111, half of it subnormal
            np.arange(1 << 12, dtype=np.uint32) + np.uint32(1 << 31),
        ]
    )
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    got = np.asarray(jax.jit(lambda x: times(x, factor, wide))(x))
    np.testing.assert_array_equal(got.view(np.uint32), product(x, factor, wide).view(np.uint32))
