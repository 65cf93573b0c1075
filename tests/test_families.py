"""Every leaf of every family, bit for bit, against what the real MaxText wrote."""

import numpy as np
import pytest
import tiny
from jobs import job_words
from recorded import RECORDED, by_numpy, compare

from maxconv.algebra import Affine, Apply, Cast, Concat, evaluate, invert, tensors
from maxconv.config import parse
from maxconv.jobs.prepare import prepared


@pytest.mark.parametrize("name", RECORDED)
def test_leaves_are_those_of_maxtext(name, tmp_path):
    _, different = compare(name, tmp_path, by_numpy)
    assert not different


LONG = {"deepseek4-284b", "gemma4-26b+vision", "qwen3.5-35b-a3b-fp8"}  # to compile


def compiled():
    """Of the runs that differ in dtypes alone one: in bfloat16, or float32 if layers are apart.
    The first of each case, and of each adapter, comes before CI's slow tests, but for `LONG`."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, run in RECORDED.items():
        alike.setdefault((run["case"], run.get("adapter", ""), *run["words"]), []).append(name)
    seen: set[tuple[str, ...]] = set()
    for (case, adapter, *_), names in alike.items():
        name = names[0 if " scan" in names[0] else -1]
        is_slow = case in LONG or (case, adapter) in seen
        yield pytest.param(name, marks=pytest.mark.slow if is_slow else [])
        seen.add((case, adapter))


@pytest.mark.parametrize("name", [*compiled()])
def test_the_engine_makes_those_of_maxtext(name, tmp_path):
    _, different = compare(name, tmp_path)
    assert not different


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("case", "scan"), tiny.LAYERS)
def test_the_way_back_recovers_every_tensor(case, scan, dtype, tmp_path):
    model = tiny.write(case, tmp_path / "hf", dtype=dtype)
    words = job_words(tmp_path, model, tiny.maxtext_words(case, scan), "fsdp8")
    saved = tiny.CASES[case].save_dtypes[0]
    with prepared(parse([*words, f"--save_dtype={saved}"])) as job:
        model = job.model
        read = [x for name, x in model.tensors.items() if not model.is_dropped(name)]
        arrays = {t.name: job.source.tensor(t.name) for x in read for t in tensors(x)}
    made = {leaf.name: unrounded(leaf.leaf.expr) for leaf in job.plan.leaves}
    rules = {name: expr for name, expr in made.items() if any(tensors(expr))}  # no constants
    back = invert(rules)
    assert invert(back) == rules
    assert set(back) == set(arrays)
    leaves = {name: evaluate(expr, arrays) for name, expr in rules.items()}
    for name, expr in back.items():
        want = arrays[name]
        got = evaluate(expr, leaves)
        if any_scaled(expr) and want.dtype == np.float32:  # rounded there, and on the way back
            np.testing.assert_array_max_ulp(got, want, maxulp=2)
        else:  # of a narrower dtype, a scaled leaf in float32 has bits enough to round back
            np.testing.assert_array_equal(got.astype(want.dtype), want)


def unrounded(expr):
    """An expression without casts: some tensors are float32 among the others."""
    match expr:
        case Apply(Cast(), x):
            return unrounded(x)
        case Apply(op, x):
            return Apply(op, unrounded(x))
        case Concat(axis, parts):
            return Concat(axis, tuple(unrounded(part) for part in parts))
    return expr


def any_scaled(expr):
    return isinstance(expr, Apply) and (isinstance(expr.op, Affine) or any_scaled(expr.x))
