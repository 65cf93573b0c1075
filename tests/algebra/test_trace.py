"""Every op, random boxes, against numpy on whole arrays."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxconv.algebra import (
    Concat,
    Fill,
    Read,
    Slice,
    Stacked,
    bind,
    dims,
    evaluate,
    fit,
    full,
    hf,
    read_box,
    rearrange,
    scale,
    shift,
    trace,
    volume,
)

SHAPES = {"q": (12, 5), "v": (6, 5), "w": (12, 5), "b": (12,), **{f"k{i}": (12, 5) for i in "01"}}
ARRAYS = {
    n: np.random.default_rng(i).standard_normal(s, np.float32)
    for i, (n, s) in enumerate(SHAPES.items())
}
F = np.float32
HEADS = rearrange("(h d) e -> e h d", h=3)
ROPE = rearrange("(h t d) e -> e h (d t)", h=3, t=2)
K = [ARRAYS[f"k{i}"].reshape(3, 2, 2, 5).transpose(3, 0, 2, 1).reshape(5, 3, 4) for i in range(2)]
CASES = {
    "tensor": (hf("q"), ARRAYS["q"]),
    "heads": (hf("q") >> HEADS, ARRAYS["q"].T.reshape(5, 3, 4)),
    "slice": (hf("q") >> Slice(0, 3, 6), ARRAYS["q"][3:9]),
    "slice, heads": (hf("q") >> Slice(0, 3, 6) >> HEADS, ARRAYS["q"][3:9].T.reshape(5, 3, 2)),
    "pad": (hf("q") >> fit(0, 15), np.pad(ARRAYS["q"], ((0, 3), (0, 0)))),
    "cut": (hf("q") >> fit(0, 7), ARRAYS["q"][:7]),
    "pad above": (
        hf("q") >> rearrange("a b -> b a") >> fit(1, 15),
        np.pad(ARRAYS["q"].T, ((0, 0), (0, 3))),
    ),
    "pad, scale": (
        hf("q") >> fit(-1, 8) >> scale(0.3),
        np.pad(ARRAYS["q"], ((0, 0), (0, 3))) * F(0.3),
    ),
    "affine": (hf("b") >> scale(0.1) >> shift(1), ARRAYS["b"] * F(0.1) + F(1)),
    "concat": (
        Concat(0, (hf("q"), hf("v") >> scale(3), Fill((2, 5), 1.5))),
        np.concatenate([ARRAYS["q"], ARRAYS["v"] * F(3), np.full((2, 5), 1.5, F)]),
    ),
    "stack": (hf("k{l}") >> ROPE >> scale(0.5), np.stack(K, 1) * F(0.5)),
}


def bound(name):
    return bind(CASES[name][0], SHAPES, {"l": Stacked((0, 1), 1)})


@pytest.mark.parametrize("name", CASES)
def test_whole(name):
    assert bound(name).shape == CASES[name][1].shape
    np.testing.assert_array_equal(evaluate(bound(name), ARRAYS), CASES[name][1])


@given(st.sampled_from(list(CASES)), st.data())
def test_random_boxes(name, data):
    whole = CASES[name][1]
    box = []
    for n in whole.shape:
        lo = data.draw(st.integers(0, n - 1))
        box.append((lo, data.draw(st.integers(lo + 1, n))))
    t = trace(bound(name), tuple(box))
    got = t.run([read_box(ARRAYS[r.name], r.box) for r in t.reads])
    np.testing.assert_array_equal(got, whole[tuple(slice(*b) for b in box)])


@pytest.mark.parametrize("name", CASES)
def test_run_can_be_jitted(name):
    t = trace(bound(name))
    inputs = [read_box(ARRAYS[r.name], r.box) for r in t.reads]
    np.testing.assert_array_equal(jax.jit(t.run)(inputs), CASES[name][1])


def test_reads_are_no_more_than_the_box_needs():
    scanned = bind(hf("k{l}") >> HEADS, SHAPES, {"l": Stacked((0, 1), 1)})
    one_layer_one_head = ((0, 5), (1, 2), (2, 3), (0, 4))
    assert trace(scanned, one_layer_one_head).reads == (Read("k1", ((8, 12), (0, 5))),)


def test_cutting_inside_a_rope_pair_reads_whole_heads():
    expr = bind(hf("q") >> ROPE, SHAPES)
    (read,) = trace(expr, ((0, 5), (1, 2), (0, 2))).reads
    assert read.box == ((4, 8), (0, 5))  # the head's other rows are read, and trimmed
    (read,) = trace(expr, ((2, 3), (0, 3), (0, 4))).reads
    assert read.box == ((0, 12), (2, 3))


def test_padding_a_tensor_reads_past_its_end():
    expr = bind(hf("q") >> fit(0, 15) >> HEADS, SHAPES)
    (read,) = trace(expr, full(expr.shape)).reads
    assert dims(read.box) == (15, 5) and volume(read.box) == 75
