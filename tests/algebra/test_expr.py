import numpy as np
import pytest

from maxconv.algebra import (
    Affine,
    AlgebraError,
    Apply,
    Concat,
    Rearrange,
    Slice,
    Stacked,
    Tensor,
    apply,
    bind,
    evaluate,
    fit,
    hf,
    rearrange,
    scale,
    substitute,
    tensors,
)

GATE = hf("layers.{l}.gate") >> rearrange("m e -> e m")
SHAPES = {f"layers.{i}.gate": (4, 3) for i in range(5)}


def test_a_free_index_is_a_number_or_a_stack():
    one = bind(GATE, SHAPES, {"l": 2})
    assert one.shape == (3, 4)
    assert [t.name for t in tensors(one)] == ["layers.2.gate"]
    scanned = bind(GATE, SHAPES, {"l": Stacked(range(5), 1)})
    assert scanned.shape == (3, 5, 4)
    arrays = {n: np.random.default_rng(i).random((4, 3)) for i, n in enumerate(SHAPES)}
    by_hand = np.stack([arrays[n].T for n in SHAPES], axis=1)
    np.testing.assert_array_equal(evaluate(scanned, arrays), by_hand)


def test_stacks_of_stacks_stand_side_by_side():
    arrays = {f"l{i}": np.random.default_rng(i).random((4, 3)) for i in range(6)}
    shapes = dict.fromkeys(arrays, (4, 3))
    blocks = bind(hf("l{l}"), shapes, {"l": Stacked(((0, 1), (2, 3), (4, 5)), 1)})
    by_hand = np.stack([*arrays.values()]).reshape(3, 2, 4, 3).transpose(2, 0, 1, 3)
    np.testing.assert_array_equal(evaluate(blocks, arrays), by_hand)


def test_tensors_are_replaced_and_the_result_is_canonical():
    scanned = bind(GATE, SHAPES, {"l": Stacked(range(2), 1)})
    halves = Tensor("both", (2, 3, 4))
    parts = {
        f"layers.{i}.gate": halves >> Slice(0, i, 1) >> rearrange("1 e m -> m e") for i in range(2)
    }
    made = substitute(scanned, {name: bind(x, {"both": (2, 3, 4)}) for name, x in parts.items()})
    both = np.random.default_rng(0).random((2, 3, 4))
    np.testing.assert_array_equal(evaluate(made, {"both": both}), both.transpose(1, 0, 2))


def test_stacks_nest_in_the_order_given_and_clamp_to_the_rank():
    shapes = {f"l{i}.e{j}": (2, 3) for i in range(4) for j in range(5)}
    experts = bind(hf("l{l}.e{e}"), shapes, {"l": Stacked(range(4), 1), "e": Stacked(range(5), 0)})
    assert experts.shape == (5, 4, 2, 3)
    norm = bind(hf("n{l}"), {"n0": (7,), "n1": (7,)}, {"l": Stacked((0, 1), 3)})
    assert norm.shape == (7, 2)


def test_a_stack_of_one_is_a_unit_axis():
    assert bind(GATE, SHAPES, {"l": Stacked((3,), 0)}).shape == (1, 3, 4)


def test_cells_are_canonical():
    shapes = {"q": (12, 5)}
    template = (
        hf("q") >> rearrange("(h d) e -> h d e", h=2) >> scale(2.0) >> rearrange("h d e -> e h d")
    )
    bound = bind(template, shapes)
    assert bound == bind(hf("q") >> scale(2.0) >> rearrange("(h d) e -> e h d", h=2), shapes)
    assert isinstance(bound, Apply) and isinstance(bound.op, Rearrange)  # one movement
    assert isinstance(bound.x, Apply) and isinstance(bound.x.op, Affine)  # after arithmetic
    assert bind(hf("q") >> rearrange("a b -> a b") >> fit(0, 12) >> scale(1), shapes) == Tensor(
        "q", (12, 5)
    )


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (hf("nope"), "tensor nope is missing"),
        (hf("q") >> rearrange("(h d) e -> e h d", h=5), r"q: .*does not fit shape \(12, 5\)"),
        (hf("q") >> Slice(0, 8, 8), r"q: Slice.* reaches past shape \(12, 5\)"),
        (hf("q") >> fit(2, 3), "q: Fit.* does not fit shape"),
        (Concat(0, (hf("q"), hf("k"))), r"k gives \(3, 4\) where q gives \(12, 5\)"),
    ],
)
def test_what_does_not_fit_names_the_tensor(template, why):
    with pytest.raises(AlgebraError, match=why):
        bind(template, {"q": (12, 5), "k": (3, 4)})


def test_layers_of_different_shapes_are_named():
    shapes = {**SHAPES, "layers.3.gate": (4, 9)}
    with pytest.raises(AlgebraError, match="layers.3.gate gives"):
        bind(GATE, shapes, {"l": Stacked(range(5), 1)})


def test_apply_refuses_what_is_already_bound_to_another_shape():
    bound = rearrange("a b -> b a").bind((2, 3))
    with pytest.raises(AlgebraError, match="does not fit shape"):
        apply(bound, Tensor("x", (4, 5)))


@pytest.mark.parametrize("cut", [Slice(0, 0, 4), Slice(0, 2, 4), Slice(0, 4, 3), Slice(1, 1, 2)])
def test_what_is_cut_from_parts_side_by_side_reads_no_others(cut):
    a, b = np.arange(12).reshape(4, 3), np.arange(12, 21).reshape(3, 3)
    both = Concat(0, (Tensor("a", a.shape), Tensor("b", b.shape)))
    got = apply(cut, both)
    whole = np.concatenate([a, b])
    want = whole[:, 1:] if cut.axis else whole[cut.start : cut.start + cut.n]
    np.testing.assert_array_equal(evaluate(got, {"a": a, "b": b}), want)
    assert not isinstance(got, Apply)
    assert apply(Slice(0, 0, 4), both) == both.parts[0]
    assert apply(Slice(0, 4, 3), both) == both.parts[1]
