import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maxconv.algebra import AlgebraError, full, rearrange


def run(pattern, x, **sizes):
    op = rearrange(pattern, **sizes).bind(x.shape)
    return op.run(x, full(x.shape), full(op.shape(x.shape)))


def test_patterns_equal_numpy_by_hand():
    x = np.arange(12 * 5).reshape(12, 5)
    np.testing.assert_array_equal(run("o i -> i o", x), x.T)
    np.testing.assert_array_equal(run("(h d) e -> e h d", x, h=3), x.T.reshape(5, 3, 4))
    np.testing.assert_array_equal(run("(h d) e -> e 1 h d", x, h=3), x.T.reshape(5, 1, 3, 4))
    halves = x.reshape(3, 2, 2, 5)  # heads, halves, pairs, emb
    pairs = halves.transpose(3, 0, 2, 1).reshape(5, 3, 4)
    np.testing.assert_array_equal(run("(h t d) e -> e h (d t)", x, h=3, t=2), pairs)


@pytest.mark.parametrize(
    ("one", "other", "shape", "sizes"),
    [
        ("a b -> b a", "x y -> y x", (3, 4), {}),
        ("(a b) c -> c (a b)", "x y -> y x", (6, 4), {"a": 2}),
        ("(h d) e -> e h d", "(q r) s -> s q r", (6, 4), {"h": 2, "q": 2}),
        ("(a u) b -> b u a", "a b -> b 1 a", (3, 4), {"u": 1}),
    ],
)
def test_patterns_that_move_the_same_are_equal(one, other, shape, sizes):
    def bound(text):
        return rearrange(text, **{k: v for k, v in sizes.items() if k in text}).bind(shape)

    assert bound(one) == bound(other)


def test_neighbours_fuse_into_one_movement():
    first = rearrange("(h t d) e -> e h (d t)", h=2, t=2).bind((12, 5))
    second = rearrange("e h d -> h 1 d e").bind((5, 2, 6))
    fused = first.then(second)
    assert fused == rearrange("(h t d) e -> h 1 (d t) e", h=2, t=2).bind((12, 5))
    assert rearrange("(a b) -> b a", a=2).bind((6,)).then(rearrange("b a -> (b a)").bind((3, 2)))
    crossing = rearrange("(c d) -> d c", c=2).bind((6,))
    assert rearrange("a b -> (a b)").bind((3, 2)).then(crossing) is None


def test_inverse_is_the_pattern_read_backwards():
    op = rearrange("(h t d) e -> e h (d t)", h=2, t=3).bind((12, 5))
    assert op.inverse((12, 5)) == rearrange("e h (d t) -> (h t d) e", t=3).bind((5, 2, 6))
    assert op.inverse((12, 5)).inverse(op.shape((12, 5))) == op


@pytest.mark.parametrize(
    ("pattern", "shape", "sizes", "why"),
    [
        ("a b -> b", (2, 3), {}, "name each atom once"),
        ("a b b -> b a b", (2, 3, 3), {}, "name each atom once"),
        ("a b", (2, 3), {}, 'exactly one "->"'),
        ("a b -> b a", (2, 3, 4), {}, r'"a b -> b a" does not fit shape \(2, 3, 4\)'),
        ("(a b) -> a b", (6,), {"a": 4}, r"a=4 does not fit shape \(6,\)"),
        ("(a b c) -> a b c", (6,), {"a": 2}, "does not fit"),
    ],
)
def test_misfits_quote_pattern_and_shape(pattern, shape, sizes, why):
    with pytest.raises(AlgebraError, match=why):
        rearrange(pattern, **sizes).bind(shape)


@st.composite
def movements(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    names = [f"n{i}" for i in range(len(sizes))]

    def side(order):
        cuts = draw(st.lists(st.booleans(), min_size=len(order), max_size=len(order)))
        groups = [[order[0]]]
        for name, cut in zip(order[1:], cuts[1:], strict=True):
            groups.append([name]) if cut else groups[-1].append(name)
        return " ".join(f"({' '.join(g)})" for g in groups), groups

    left, groups = side(names)
    right, _ = side(draw(st.permutations(names)))
    by_name = dict(zip(names, sizes, strict=True))
    shape = tuple(int(np.prod([by_name[n] for n in g])) for g in groups)
    return rearrange(f"{left} -> {right}", **by_name).bind(shape), shape


@given(movements(), st.data())
def test_random_boxes_of_random_movements(movement, data):
    op, shape = movement
    x = np.arange(int(np.prod(shape))).reshape(shape)
    whole = op.run(x, full(shape), full(op.shape(shape)))
    np.testing.assert_array_equal(op.inverse(shape).run(whole, full(whole.shape), full(shape)), x)
    box = tuple(
        tuple(sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)))))
        for n in whole.shape
    )
    box = tuple((lo, hi) if lo < hi else (lo, lo + 1) for lo, hi in box)
    in_box, cover = op.pull(box, shape)
    part = op.run(x[tuple(slice(*b) for b in in_box)], in_box, cover)
    np.testing.assert_array_equal(part, whole[tuple(slice(*b) for b in cover)])
    assert all(c[0] <= b[0] and b[1] <= c[1] for b, c in zip(box, cover, strict=True))
