"""A LoRA adapter is merged into the weights while they are converted."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
import tiny
from jobs import job_words
from safetensors.numpy import load_file, save_file

from maxconv.config import parse
from maxconv.convert import prepared
from maxconv.engine import Engine
from maxconv.errors import UserError

CASE = "llama3.1-8b"
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def base(tmp_path):
    return tiny.write(CASE, tmp_path / "base", "float32", shard_bytes=None)


def write_adapter(directory, base, rank=4, more=None, **config):
    """An adapter as PEFT saves it, and the float64 sum that it stands for."""
    random = np.random.default_rng(0)
    weights = load_file(base / "model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"} | config
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    tensors, want = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith(ADAPTED):
            continue
        a = random.standard_normal((rank, weight.shape[1]), np.float32)
        b = random.standard_normal((weight.shape[0], rank), np.float32)
        at = f"base_model.model.{module}"
        tensors |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        want[name] = weight + scaling * (b.astype(np.float64) @ a)
    directory.mkdir()
    save_file(tensors | (more or {}), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return {name: x.astype(np.float32) for name, x in want.items()}


def leaves(directory, model, *more):
    words = job_words(directory, model, tiny.maxtext_words(CASE, True), "fsdp4_tp2", more)
    with prepared(parse([*words, "--save_dtype=float32"])) as job:
        with Engine(job.plan, job.source, window=1 << 20) as engine:
            made = {leaf.name: np.asarray(engine.make(leaf)) for leaf in job.plan.leaves}
            assert job.source.stats.bytes_read == job.plan.read_nbytes(0)
    return made


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
def test_the_result_is_that_of_merged_weights(config, base, tmp_path):
    want = write_adapter(tmp_path / "adapter", base, **config)
    plain = leaves(tmp_path, base)
    ours = leaves(tmp_path, base, f"hf_lora_adapter_path={tmp_path / 'adapter'}")
    save_file(want, base / "model.safetensors")
    theirs = leaves(tmp_path, base)
    for name, leaf in theirs.items():
        np.testing.assert_allclose(ours[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name in plain if not np.array_equal(plain[name], ours[name])}
    kernels = ("self_attention.query", "self_attention.value", "mlp.wo")
    assert changed == {f"params.params.decoder.layers.{at}.kernel" for at in kernels}


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"use_dora": True}, {}, "use_dora=true is not supported"),
        ({}, {"base_model.model.lm_head.weight": (2, 2)}, "lm_head.weight fits no weight"),
        ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": (4, 42)}, "layers.9"),
        ({}, {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (4, 42)}, "no lora_B"),
        ({}, {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 41)}, "matmul of|plus of"),
    ],
)
def test_what_fits_nothing_is_named(config, more, said, base, tmp_path):
    tensors = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in more.items()}
    write_adapter(tmp_path / "adapter", base, more=tensors, **config)
    with pytest.raises(UserError, match=said):
        leaves(tmp_path, base, f"hf_lora_adapter_path={tmp_path / 'adapter'}")


def test_an_adapter_alone_is_refused(tmp_path):
    words = [f"model_name={CASE}", f"hf_lora_adapter_path={tmp_path}", "hardware=cpu"]
    with pytest.raises(UserError, match="--hf_model_path"):
        with prepared(parse([*words, f"base_output_directory={tmp_path / 'out'}"])):
            pass
