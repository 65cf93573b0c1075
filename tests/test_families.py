"""Every leaf of every family, bit for bit, against what the real MaxText wrote."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from jobs import job_words

from maxconv.algebra import Affine, Apply, Cast, Concat, evaluate, invert, tensors
from maxconv.config import parse
from maxconv.convert import prepared
from maxconv.engine import Engine

# Written by tests/maxtext/record.py.
RECORDED = json.loads((Path(__file__).parent / "data/maxtext_leaves.json").read_text())


@pytest.mark.parametrize("name", RECORDED)
def test_leaves_are_those_of_maxtext(name, tmp_path):
    recorded = RECORDED[name]
    case, key = recorded["case"], "--hf_model_path"
    if adapter := recorded.get("adapter"):
        key = "hf_lora_adapter_path"
        model = tiny.write_adapter(case, adapter, tmp_path / "hf", recorded["source_dtype"])
    else:
        model = tiny.write(case, tmp_path / "hf", recorded["source_dtype"])
    mesh = "fsdp8" if " scan" in name else "fsdp4_tp2"
    words = [*recorded["words"], f"--save_dtype={recorded['save_dtype']}"]
    with prepared(parse(job_words(tmp_path, model, words, mesh, key=key))) as job:
        with Engine(job.plan, job.source, window=1 << 20) as engine:
            ours = {leaf.name: engine.make(leaf) for leaf in job.plan.leaves}
            compiled = engine.stats.compiled
    theirs = {ours_of(n): leaf for n, leaf in recorded["leaves"].items() if n != "step"}
    assert set(ours) == set(theirs)
    different = [
        n for n in ours if described(as_recorded(ours[n], theirs[n]["dtype"])) != theirs[n]
    ]
    assert not different
    assert compiled == len(job.plan.recipes) + len(job.plan.blanks)


def ours_of(name):
    """The name of a leaf of MaxText's: what it keeps beside params, maxconv has below them."""
    return re.sub(r"^params\.(MoEBiasVar|Tid2EidVar)\.", "params.params.", name)


def as_recorded(leaf, dtype):
    """A leaf's values; numbers of experts are integers here, which MaxText's converter rounds."""
    array = np.asarray(leaf)
    return array.astype(dtype) if array.dtype.kind == "i" else array


def described(array):
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


@pytest.mark.parametrize(("case", "scan"), tiny.LAYERS)
def test_the_way_back_recovers_every_tensor(case, scan, tmp_path):
    model = tiny.write(case, tmp_path / "hf", dtype="bfloat16")
    words = job_words(tmp_path, model, tiny.maxtext_words(case, scan), "fsdp8")
    dtype = tiny.CASES[case].save_dtypes[0]
    with prepared(parse([*words, f"--save_dtype={dtype}"])) as job:
        model = job.plan.model
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
        if any_scaled(expr):
            got = got.astype(want.dtype)  # the float32 leaf has bits enough to round back
        np.testing.assert_array_equal(got, want)


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
