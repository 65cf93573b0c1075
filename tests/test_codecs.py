"""Quantised weights are what their formats say, in whole and in part."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from jobs import job_words
from plans import make_leaf
from safetensors.numpy import load_file, save_file

from maxconv.algebra import Tensor, dims, evaluate, full, slices, trace
from maxconv.config import parse
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.jobs.prepare import prepared
from maxconv.models.codecs import decoded

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)


def fp8_parts(random, shape=(37, 70), block=(16, 32)):
    grid = tuple(-(-n // k) for n, k in zip(shape, block, strict=True))
    scale = random.uniform(1e-4, 3, grid).astype(np.float32)
    weight = random.standard_normal(shape).astype(np.float32).astype(FP8)
    wide = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[: shape[0], : shape[1]]
    config = {"quantization_config": {"weight_block_size": list(block)}}
    return {"w": weight, "w_scale_inv": scale}, weight.astype(np.float32) * wide, config


def mxfp4_parts(random):
    blocks = random.integers(0, 256, (3, 10, 2, 16), np.uint8)
    scales = random.integers(0, 255, (3, 10, 2), np.uint8)
    scales[0, 0] = 0, 1  # 2^-127 and 2^-126
    fp4 = np.stack([blocks & 15, blocks >> 4], -1).view(ml_dtypes.float4_e2m1fn)
    numbers = fp4.astype(np.float32).reshape(3, 10, 2, 32)
    with np.errstate(over="ignore"):
        product = np.ldexp(numbers, scales.astype(np.int32)[..., None] - 127)
    want = product.reshape(3, 10, 64).swapaxes(1, 2)
    return {"w_blocks": blocks, "w_scales": scales}, want, {}


def int4_parts(random):
    numbers = random.integers(-8, 8, (6, 64))
    nibbles = (numbers + 8).astype(np.uint32).reshape(6, 8, 8)
    packed = np.bitwise_or.reduce(nibbles << np.arange(0, 32, 4, dtype=np.uint32), axis=-1)
    scale = random.uniform(0.01, 1, (6, 2)).astype(BF16)
    want = numbers.astype(np.float32) * np.repeat(scale.astype(np.float32), 32, 1)
    parts = {"w_packed": packed.view(np.int32), "w_scale": scale, "w_shape": np.array([6, 64])}
    return parts, want, {}


@pytest.mark.parametrize("made", [fp8_parts, mxfp4_parts, int4_parts])
def test_weights_are_decoded_in_whole_and_in_boxes(made):
    random = np.random.default_rng(0)
    parts, want, config = made(random)
    weights, notices = decoded({n: Tensor(n, x.shape) for n, x in parts.items()}, config)
    assert set(weights) == {"w"} and len(notices) == 1
    assert weights["w"].shape == want.shape
    np.testing.assert_array_equal(evaluate(weights["w"], parts), want)
    for _ in range(50):
        ends = [sorted(random.choice(n + 1, 2, replace=False)) for n in want.shape]
        box = tuple((int(lo), int(hi)) for lo, hi in ends)
        got = evaluate(weights["w"], parts, box)
        assert got.shape == dims(box)
        np.testing.assert_array_equal(got, want[slices(box)])
    found = trace(weights["w"])
    compiled = jax.jit(found.run)([parts[read.name] for read in found.reads])
    tiniest = np.abs(want) < 2.0**-124  # a device takes factors below 2^-126 for zero
    np.testing.assert_array_equal(np.where(tiniest, 0, compiled), np.where(tiniest, 0, want))


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="w is not fp8.*does not fit shape"):
        decoded({"w": Tensor("w", (300, 40)), "w_scale_inv": Tensor("w_scale_inv", (2, 1))}, {})


@pytest.mark.parametrize("mesh", ["fsdp8", "fsdp4_tp2"])
def test_a_checkpoint_in_fp8_converts_like_the_one_it_stands_for(mesh, tmp_path):
    plain = tiny.write("qwen3-8b", tmp_path / "plain", shard_bytes=None)
    packed = tmp_path / "packed"
    packed.mkdir()
    random, quantised, quantization = np.random.default_rng(1), {}, {}
    dequantised = load_file(plain / "model.safetensors")
    for name, weight in dequantised.items():
        if "_proj" not in name:
            quantised[name] = weight
            continue
        parts, want, quantization = fp8_parts(random, weight.shape)
        quantised |= {name + suffix.removeprefix("w"): x for suffix, x in parts.items()}
        dequantised[name] = want.astype(BF16)
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | quantization))
    save_file(quantised, packed / "model.safetensors")
    save_file(dequantised, plain / "model.safetensors")
    ours, theirs = (leaves(tmp_path, model, mesh) for model in (packed, plain))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name].view(np.uint16), theirs[name].view(np.uint16))


def test_experts_in_fp8_one_by_one_convert_like_those_in_one_tensor(tmp_path):
    plain = tiny.write("qwen3.5-35b-a3b", tmp_path / "plain", shard_bytes=None)
    packed = tmp_path / "packed"
    packed.mkdir()
    random, pieces, quantization = np.random.default_rng(2), {}, {}
    fused = load_file(plain / "model.safetensors")
    for name, weight in fused.items():
        layer, found, kind = name.partition("experts.")
        if not found:
            pieces[name] = weight
            continue
        for e, expert in enumerate(weight):
            parts = {"down_proj": expert}
            if kind == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), np.split(expert, 2), strict=True))
            for part, piece in parts.items():
                made, want, quantization = fp8_parts(random, piece.shape)
                of = f"{layer}experts.{e}.{part}.weight"
                pieces |= {of + suffix.removeprefix("w"): x for suffix, x in made.items()}
                piece[...] = want.astype(BF16)
    config = json.loads((plain / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | quantization))
    save_file(pieces, packed / "model.safetensors")
    save_file(fused, plain / "model.safetensors")
    ours, theirs = (leaves(tmp_path, x, "fsdp8", "qwen3.5-35b-a3b") for x in (packed, plain))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(ours[name].view(np.uint16), theirs[name].view(np.uint16))


def leaves(directory, model, mesh, case="qwen3-8b"):
    words = job_words(directory, model, tiny.maxtext_words(case, True), mesh)
    with prepared(parse(words)) as job, Engine(job.plan, job.source, window=1 << 20) as engine:
        made = {leaf.name: np.asarray(make_leaf(engine, leaf)) for leaf in job.plan.leaves}
        assert job.source.stats.bytes_read == job.plan.read_nbytes(0)
        assert all(full(made[leaf.name].shape) == full(leaf.shape) for leaf in job.plan.leaves)
    return made
