"""Leaves, however cut and sharded, equal the whole expression, and nothing is done twice."""

import json
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jobs import tiny_job
from plans import is_local, make_leaf, make_plan
from safetensors.numpy import save_file

from maxconv.algebra import (
    Concat,
    Slice,
    Stacked,
    bind,
    evaluate,
    fit,
    hf,
    rearrange,
    scale,
    shift,
)
from maxconv.execution.engine import Engine
from maxconv.execution.program import compile_cell, typed
from maxconv.planning.cells import steps
from maxconv.planning.lanes import Stored
from maxconv.planning.plan import Leaf, LeafPlan, Plan
from maxconv.planning.slabs import slabs
from maxconv.sources import LocalSource

MESH = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
RANDOM = np.random.default_rng(0)
TENSORS = {
    "embed": (24, 16),
    "fused": (48, 16),
    "odd": (9, 16),
    **{f"q{i}": (32, 16) for i in range(4)},
    **{f"e{i}.{j}": (24, 16) for i in range(4) for j in range(8)},
}
LAYERS = {"l": Stacked((0, 1, 2, 3), 1), "e": Stacked(tuple(range(8)), 0)}
ROPE = rearrange("(h t d) e -> e h (d t)", h=4, t=2)
LEAVES = {
    "whole": (hf("embed"), P("x", "y")),
    "replicated": (hf("embed"), P()),
    "transposed": (hf("embed") >> rearrange("v e -> e v"), P(("x", "y"), "z")),
    "heads": (hf("q0") >> rearrange("(h d) e -> e h d", h=4), P("x", ("y", "z"), None)),
    "inside a head": (hf("q0") >> ROPE >> scale(0.3), P("x", None, ("y", "z"))),
    "scanned": (hf("q{l}") >> ROPE >> scale(0.3), P("x", None, "y", None)),
    "scanned, over layers": (hf("q{l}") >> ROPE, P("x", ("y", "z"))),
    "experts": (hf("e{l}.{e}") >> rearrange("m e -> e m"), P(("x", "y"), None, "z", None)),
    "experts, replicated": (hf("e{l}.{e}") >> rearrange("m e -> e m"), P(None, None, "z")),
    "experts, some in a shard": (hf("e{l}.{e}") >> rearrange("m e -> e m"), P("x", None, "z")),
    "padded": (hf("embed") >> fit(0, 32), P("x", "y")),
    "padded rows of a shard": (hf("odd") >> fit(0, 16) >> scale(2), P(("x", "y", "z"), None)),
    "cut": (hf("embed") >> fit(0, 20), P("x", "y")),
    "slices": (hf("fused") >> Slice(0, 16, 32) >> rearrange("m e -> e m"), P("x", "y")),
    "side by side": (
        Concat(0, (hf("embed"), hf("fused") >> shift(1))) >> rearrange("m e -> e m"),
        P("x", "y"),
    ),
    "not divisible": (hf("odd"), P(None, "x")),
}
# One is cut inside a permuted atom, the other concatenates along a sharded axis.
NOT_LOCAL = ("inside a head", "side by side")


@pytest.fixture(scope="module")
def arrays():
    return {
        name: RANDOM.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16)
        for name, shape in TENSORS.items()
    }


@pytest.fixture(scope="module")
def source(arrays, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    save_file(arrays, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({}))
    return LocalSource(str(directory))


def plan_of(source, named, budget):
    template, spec = named
    expr = bind(template, {n: i.shape for n, i in source.tensors.items()}, LAYERS)
    to, dtype = NamedSharding(MESH, spec), np.dtype(ml_dtypes.bfloat16)
    stored = {n: Stored(i.dtype) for n, i in source.tensors.items()}
    made = slabs(steps(expr, stored, dtype, to, budget), expr.shape, dtype, to, math.inf)
    leaf = LeafPlan(Leaf("params.params.leaf", expr, dtype, to), made)
    return Plan(MESH, (leaf,), source.tensors)


@pytest.mark.parametrize(("name", "programs"), [("padded", 0), ("transposed", 1), ("cut", 0)])
def test_what_is_only_read_needs_no_program(name, programs, source, arrays):
    plan = plan_of(source, LEAVES[name], 1 << 20)
    with Engine(plan, source, window=1 << 20) as engine:
        made = make_leaf(engine, plan.leaves[0])
    assert engine.programs.compiled == plan.programs == programs
    want = evaluate(plan.leaves[0].leaf.expr, arrays)
    np.testing.assert_array_equal(np.asarray(made).view(np.uint16), want.view(np.uint16))


def test_a_buffer_is_written_in_place(source):
    """On CPUs it holds bits until the end: with a bitcast XLA copies all of it in every step."""
    template, spec = LEAVES["scanned"]
    plan = plan_of(source, (template, spec), 300)
    (recipe, *_) = plan.recipes
    text = compile_cell(recipe).as_text()
    assert "input_output_alias={ {}: (0" in text
    whole = ",".join(map(str, recipe.sharding.shard_shape(recipe.shape)))
    assert not re.findall(rf"\[{whole}\]\S* (?:copy|bitcast-convert)\(", text)
    bits = jax.device_put(np.arange(4096, dtype=np.uint16), jax.devices()[0])
    bits = jax.device_put(bits, NamedSharding(MESH, P()))
    seen = typed(bits, np.dtype(ml_dtypes.bfloat16))
    for before, after in zip(bits.addressable_shards, seen.addressable_shards, strict=True):
        assert after.data.unsafe_buffer_pointer() == before.data.unsafe_buffer_pointer()
        assert after.data.dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("budget", [1 << 20, 300])
@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_its_expression(name, budget, source, arrays):
    plan = plan_of(source, LEAVES[name], budget)
    (leaf,) = plan.leaves
    before = source.stats.bytes_read
    with Engine(plan, source, window=1 << 20) as engine:
        made = make_leaf(engine, leaf)
    want = evaluate(leaf.leaf.expr, arrays).astype(leaf.dtype)
    np.testing.assert_array_equal(np.asarray(made).view(np.uint16), want.view(np.uint16))
    assert made.sharding == leaf.sharding
    assert source.stats.bytes_read - before == plan.read_nbytes(0) == plan.needed_nbytes
    assert engine.programs.compiled == plan.programs


@pytest.mark.parametrize("budget", [1 << 20, 300])
@pytest.mark.parametrize("name", LEAVES)
def test_no_device_needs_the_bytes_of_another(name, budget, source):
    from maxconv.execution.program import compile_cell

    recipes = plan_of(source, LEAVES[name], budget).recipes
    assert all(is_local(recipe) for recipe in recipes) == (name not in NOT_LOCAL)
    for recipe in filter(is_local, recipes):
        text = compile_cell(recipe).as_text()
        for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
            assert collective not in text


def test_one_program_serves_all_layers_and_leaves_of_a_recipe(tmp_path):
    with tiny_job(tmp_path, "llama3.1-8b") as job, Engine(job.plan, job.source, 1 << 20) as engine:
        for leaf in job.plan.leaves:
            make_leaf(engine, leaf)
        kernels = [leaf for leaf in job.plan.leaves if "mlp.wi_" in leaf.name]
        assert len({step.recipe for leaf in kernels for step in leaf.steps}) == 1
        cells = {recipe.cell for recipe in job.plan.recipes}
        shards = {leaf.sharding.shard_shape(leaf.shape) for leaf in job.plan.leaves}
        assert engine.programs.compiled <= (len(cells) + 1) * len(shards)
        assert engine.programs.compiled == job.plan.programs
        assert engine.stats.steps == len(job.plan.steps)
        assert job.source.stats.bytes_read == job.plan.read_nbytes(0)
        assert job.source.stats.bytes_read == sum(i.nbytes for i in job.source.tensors.values())


def test_it_reads_ahead_within_its_window(tmp_path):
    with tiny_job(tmp_path, "qwen3-8b") as job:
        largest = max(recipe.buffer_nbytes for recipe in job.plan.recipes)
        window = 2 * (2 * largest)
        with Engine(job.plan, job.source, window) as engine:
            for leaf in job.plan.leaves:
                make_leaf(engine, leaf)
        assert largest <= engine.stats.peak_ahead <= window // 2
        assert engine.stats.ahead == 0


def test_leaves_can_be_made_in_any_order(tmp_path):
    with tiny_job(tmp_path, "qwen3-0.6b") as job:
        with Engine(job.plan, job.source, 1 << 20) as engine:
            first = {leaf.name: np.asarray(make_leaf(engine, leaf)) for leaf in job.plan.leaves}
        with Engine(job.plan, job.source, 1 << 20) as engine:
            for leaf in reversed(job.plan.leaves):
                np.testing.assert_array_equal(np.asarray(make_leaf(engine, leaf)), first[leaf.name])


def test_a_large_cell_is_made_in_slices(tmp_path):
    with tiny_job(tmp_path, "qwen3-8b") as job:
        config = job.config
        args = (job.source, job.model, job.plan.mesh, config.logical_axis_rules)
        small = make_plan(*args, budget=4096)
        assert len(small.steps) > len(job.plan.steps)
        assert small.read_nbytes(0) == job.plan.read_nbytes(0)
        assert max(recipe.buffer_nbytes for recipe in small.recipes) < max(
            recipe.buffer_nbytes for recipe in job.plan.recipes
        )


def test_experts_of_several_dtypes(tmp_path):
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, np.float32]
    tensors = {f"e{i}": RANDOM.standard_normal((8, 4)).astype(t) for i, t in enumerate(dtypes)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with LocalSource(str(tmp_path)) as source:
        template = hf("e{e}") >> rearrange("m e -> e m")
        expr = bind(template, {n: (8, 4) for n in tensors}, {"e": Stacked(range(4), 0)})
        to, dtype = NamedSharding(MESH, P(("x", "y"))), np.dtype(ml_dtypes.bfloat16)
        parts = steps(expr, {n: Stored(t.dtype) for n, t in tensors.items()}, dtype, to, 1 << 20)
        made = slabs(parts, expr.shape, dtype, to, math.inf)
        leaf = LeafPlan(Leaf("params.params.leaf", expr, dtype, to), made)
        plan = Plan(MESH, (leaf,), source.tensors)
        with Engine(plan, source, 1 << 20) as engine:
            got = np.asarray(make_leaf(engine, leaf))
    want = np.stack([t.astype(np.float32).astype(dtype).T for t in tensors.values()])
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))


def test_nan_payloads_survive(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    tensors = {f"w{i}": bits.view(ml_dtypes.bfloat16) for i in range(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with LocalSource(str(tmp_path)) as source:
        template = hf("w{l}") >> rearrange("o i -> i o")
        expr = bind(template, {n: (256, 256) for n in tensors}, {"l": Stacked((0, 1), 1)})
        to, dtype = NamedSharding(MESH, P("x", None, "y")), np.dtype(ml_dtypes.bfloat16)
        parts = steps(expr, dict.fromkeys(tensors, Stored(dtype)), dtype, to, 1 << 20)
        made = slabs(parts, expr.shape, dtype, to, math.inf)
        leaf = LeafPlan(Leaf("params.params.leaf", expr, dtype, to), made)
        plan = Plan(MESH, (leaf,), source.tensors)
        with Engine(plan, source, 1 << 20) as engine:
            got = np.asarray(make_leaf(engine, leaf)).view(np.uint16)
    np.testing.assert_array_equal(got, np.stack([bits.T, bits.T], 1))
