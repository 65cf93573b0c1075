import numpy as np
import pytest

from maxconv.algebra import (
    AlgebraError,
    Concat,
    Fill,
    Slice,
    Stacked,
    bind,
    evaluate,
    fit,
    hf,
    invert,
    rearrange,
    scale,
    shift,
    unused,
)

SHAPES = {
    "embed": (11, 6),
    "fused": (10, 6),
    "norm": (6,),
    "cut": (9, 2),
    **{f"q{i}": (12, 6) for i in range(3)},
    **{f"e{i}.{j}": (4, 6) for i in range(3) for j in range(2)},
}
ROPE = rearrange("(h t d) e -> e h (d t)", h=3, t=2)


def rules(scan=True):
    layers = {"l": Stacked((0, 1, 2), 1), "e": Stacked((0, 1), 0)}
    templates = {
        "embedding": hf("embed") >> fit(0, 16),
        "head": hf("cut") >> fit(0, 8) >> rearrange("a b -> b a"),
        "gate": hf("fused") >> Slice(0, 0, 4) >> rearrange("a b -> b a"),
        "up": hf("fused") >> Slice(0, 4, 6) >> rearrange("a b -> b a"),
        "norm": hf("norm") >> shift(1),
        "ones": Fill((3,), 1.0),
    }
    bound = {k: bind(t, SHAPES) for k, t in templates.items()}
    query, experts = hf("q{l}") >> ROPE >> scale(0.37), hf("e{l}.{e}") >> rearrange("m e -> e m")
    if scan:
        return bound | {"q": bind(query, SHAPES, layers), "moe": bind(experts, SHAPES, layers)}
    for i in range(3):
        bound[f"q_{i}"] = bind(query, SHAPES, {"l": i})
        bound[f"moe_{i}"] = bind(experts, SHAPES, {"l": i, "e": Stacked((0, 1), 0)})
    return bound


@pytest.mark.parametrize("scan", [True, False])
def test_every_tensor_comes_back(scan):
    arrays = {
        n: np.random.default_rng(i).standard_normal(s, np.float32)
        for i, (n, s) in enumerate(SHAPES.items())
    }
    forward = rules(scan)
    leaves = {n: evaluate(e, arrays) for n, e in forward.items()}
    back = invert(forward)
    assert set(back) == set(SHAPES)
    for name, expr in back.items():
        want = arrays[name].copy()
        if name == "cut":
            want[8:] = 0  # the rows that were cut are gone
        assert expr.shape == SHAPES[name]
        np.testing.assert_allclose(evaluate(expr, leaves), want, rtol=3e-7, atol=2e-7)
        if name not in ("norm", "q0", "q1", "q2"):
            np.testing.assert_array_equal(evaluate(expr, leaves), want)


@pytest.mark.parametrize("scan", [True, False])
def test_the_inverse_of_the_inverse_is_the_rule(scan):
    forward = rules(scan)
    twice = invert(invert(forward))
    del forward["ones"]  # a constant has no source
    assert twice == forward


def test_a_bfloat16_tensor_survives_scaling_in_float32():
    import ml_dtypes

    x = np.random.default_rng(0).standard_normal((12, 6)).astype(ml_dtypes.bfloat16)
    forward = {"q": bind(hf("q0") >> ROPE >> scale(float(np.float32(128**-0.5))), SHAPES)}
    leaf = evaluate(forward["q"], {"q0": x})
    back = evaluate(invert(forward)["q0"], {"q": leaf}).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(back, x)


@pytest.mark.parametrize(
    ("cuts", "why"),
    [
        ([(0, 0, 4), (0, 4, 5)], r"tensor fused: no leaf takes \[9, 10\) of axis 0"),
        ([(0, 1, 9)], r"tensor fused: no leaf takes \[0, 1\) of axis 0"),
        ([(0, 0, 4), (0, 6, 4)], r"tensor fused: no leaf takes \[4, 6\) of axis 0"),
        ([(0, 0, 6), (0, 4, 6)], r"tensor fused: two leaves take \[4, 6\) of axis 0"),
        ([(0, 0, 6), (1, 4, 2)], "tensor fused: .* on axis 0 and on axis 1"),
    ],
)
def test_slices_that_do_not_tile_name_tensor_and_rows(cuts, why):
    forward = {f"leaf{i}": bind(hf("fused") >> Slice(*cut), SHAPES) for i, cut in enumerate(cuts)}
    with pytest.raises(AlgebraError, match=why):
        invert(forward)


def test_every_problem_is_reported_at_once():
    forward = {
        "a": bind(hf("fused") >> Slice(0, 0, 4), SHAPES),
        "b": bind(hf("embed") >> Slice(1, 2, 4), SHAPES),
    }
    with pytest.raises(AlgebraError, match="(?s)tensor fused.*tensor embed"):
        invert(forward)


def test_one_tensor_of_several_leaves_comes_from_the_first():
    forward = {
        "tied": bind(hf("embed"), SHAPES),
        "head": bind(hf("embed") >> rearrange("v e -> e v"), SHAPES),
    }
    assert invert(forward) == {"embed": bind(hf("tied"), {"tied": (11, 6)})}


def test_unused_tensors_are_found():
    forward = {"both": bind(Concat(0, (hf("embed"), hf("fused"))), SHAPES)}
    assert unused(forward, ["embed", "norm", "fused"]) == ["norm"]
