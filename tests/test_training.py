"""The training command: what config.json says beside sizes, as arguments of MaxText."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from maxconv import cli
from maxconv.config.tables import known_models, trained_models
from maxconv.families.rope import LLAMA3, Rope, difference, pairs

CPU = ("hardware=cpu", "--simulated_cpu_devices_count=2")


def planned(
    case: str, path: Path, capsys: pytest.CaptureFixture[str], *said: str, **changed: Any
) -> tuple[set[str], list[str]]:
    """The arguments of the training command in the plan, and the notes."""
    hf = tiny.write(case, path / "hf")
    config = json.loads((hf / "config.json").read_text())
    inner = config.get("text_config", config)
    for key, value in changed.items():
        inner[key] = value
    (hf / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert cli.main(["plan", *CPU, f"--hf_model_path={hf}", *said]) == 0
    lines = capsys.readouterr().out.splitlines()
    (command,) = (line.split() for line in lines if line.startswith("train "))
    assert command[1:4] == ["python", "-m", "maxtext.trainers.pre_train.train"]
    assert command[-1].startswith("load_parameters_path=/")
    return {*command[4:-1]}, [line[9:] for line in lines if line.startswith("note ")]


def test_plain_rope_of_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, notes = planned(
        "llama3.1-8b", tmp_path, capsys, rope_scaling=None, rope_theta=20000, rms_norm_eps=1e-6
    )
    assert {"rope_use_scale=False", "rope_max_timescale=20000"} <= told
    assert {"normalization_layer_epsilon=1e-06", "base_emb_dim=42", "scan_layers=True"} <= told
    assert not [note for note in notes if "config.json" in note or "MaxText" in note]


def test_the_same_rope_in_both_dialects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling = {"rope_type": "llama3", **LLAMA3, "factor": 32.0}
    old = planned(
        "llama3.1-8b", tmp_path / "old", capsys, rope_scaling=scaling, rope_theta=500000.0
    )
    new = planned(
        "llama3.1-8b",
        tmp_path / "new",
        capsys,
        rope_scaling=None,
        rope_theta=None,
        rope_parameters=scaling | {"rope_theta": 500000.0},
    )
    assert old == new
    assert {"decoder_block=llama2", "rope_type=yarn", "rope_factor=32"} <= old[0]


def test_a_llama_is_in_the_order_of_its_rope(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MaxText's own RoPE of Llama has no linear scaling, its default one no scaling by parts."""
    linear = {"rope_scaling": {"type": "linear", "factor": 2.0}}
    told, _ = planned("llama3.1-8b", tmp_path, capsys, **linear)
    assert {"decoder_block=llama2", "rope_linear_scaling_factor=2.0"} <= told
    assert not any(word.startswith("rope_type=") for word in told)  # MaxText's default
    words = [*tiny.maxtext_words("llama3.1-8b", True)]
    _, notes = planned("llama3.1-8b", tmp_path, capsys, *words, **linear)
    assert any("no RoPE like that" in note for note in notes)
    words[0] = "model_name=llama3.3-70b"
    told, notes = planned("llama3.1-8b", tmp_path, capsys, *words)
    assert {"model_name=llama3.3-70b", "rope_type=llama3.1"} <= told
    assert any("override_model_config=True rope_type=llama3.1" in note for note in notes)
    told, notes = planned("llama2-7b", tmp_path, capsys, *tiny.maxtext_words("llama2-7b", True))
    assert not any(word.startswith("rope_type=") for word in told)
    assert not [note for note in notes if "MaxText" in note]


def test_what_a_name_computes_with_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny.maxtext_words("qwen2.5-7b", True)
    told, notes = planned("qwen2.5-7b", tmp_path, capsys, *words, rope_theta=10000.0)
    assert {"model_name=qwen2.5-7b", "override_model_config=True"} <= told
    assert "rope_max_timescale=10000" in told
    assert any("override_model_config=True rope_max_timescale=10000" in note for note in notes)


def test_what_gemma_calls_gelu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config.json says hidden_act=gelu, which transformers takes for the approximation."""
    acts = {"hidden_act": "gelu", "hidden_activation": None}
    told, notes = planned("gemma-2b", tmp_path, capsys, **acts)
    assert "model_name=gemma-2b" in told
    assert not [note for note in notes if "MaxText" in note and "vocabulary" not in note]


def test_gemma3_of_another_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told, _ = planned("gemma3-4b+64", tmp_path, capsys, rope_scaling=None)
    assert {"rope_linear_scaling_factor=1.0", "sliding_window_size=8", "base_emb_dim=64"} <= told
    assert any(word.startswith("model_name=gemma3-") for word in told)


def test_experts_that_a_token_is_sent_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, _ = planned("gpt-oss-20b", tmp_path, capsys)
    assert {"num_experts_per_tok=2", "sliding_window_size=16", "num_experts=5"} <= told


@pytest.mark.parametrize(
    ("case", "changed", "said"),
    [
        ("mistral-7b", {"sliding_window": 64}, "has no sliding window, config.json has"),
        ("llama3.1-8b", {"hidden_act": "xielu"}, "hidden_act='xielu' of config.json is not"),
        ("llama3.1-8b", {"rope_scaling": {"type": "longrope"}}, "no RoPE like that"),
        ("mistral-7b", {"rope_scaling": ["a"]}, "RoPE of config.json is not understood"),
        ("qwen2.5-7b", {"rope_theta": "10000"}, "RoPE of config.json is not understood"),
        ("qwen3-30b-a3b", {"norm_topk_prob": False}, "computes with norm_topk_prob=True"),
        ("gemma2-2b", {"query_pre_attn_scalar": 144}, "computes with query_pre_attn_scalar=10"),
    ],
)
def test_what_maxtext_cannot_compute(
    case: str,
    changed: dict[str, Any],
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, notes = planned(case, tmp_path, capsys, **changed)
    assert any(said in note for note in notes), notes


def test_a_mesh_that_attention_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tiny.write("llama3.1-8b", tmp_path / "hf")
    mesh = ("hardware=cpu", "ici_tensor_parallelism=4")
    assert cli.main(["plan", f"--hf_model_path={hf}", *mesh]) == 0
    assert "MaxText refuses to train on this mesh" in capsys.readouterr().out


def test_a_yarn_is_as_near_as_it_can_be() -> None:
    """With one frequency between those that are kept and divided, there is one that is the same."""
    for dims, theta, original in (10, 1e4, 64), (16, 5e5, 8192):
        entries = {**LLAMA3, "factor": 32.0, "original_max_position_embeddings": original}
        rope = Rope("llama3", theta, entries, 4096)
        told = pairs(rope, rope, dims)
        plain = theta ** -(np.arange(0, dims, 2) / dims)
        turns = plain * original / (2 * math.pi)
        kept = np.clip((turns - 1) / 3, 0, 1)
        wanted = plain * (kept + (1 - kept) / 32)
        log = math.log(told["original_max_position_embeddings"] / (2 * math.pi))
        low, high = (
            dims * (log - math.log(told[end])) / (2 * math.log(theta))
            for end in ("beta_fast", "beta_slow")
        )
        ramp = np.clip((np.arange(dims // 2) - max(low, 0)) / (high - max(low, 0)), 0, 1)
        made = plain * (1 - ramp + ramp / told["rope_factor"])
        np.testing.assert_allclose(made, wanted, rtol=1e-6)
        built_in = Rope("llama3", theta, LLAMA3)
        assert difference(rope, built_in, dims)[1] > 1


def test_every_model_has_what_it_computes_with() -> None:
    models = trained_models()
    assert models.keys() == {"default", *known_models()}
    others = {"hf_id", "architecture", "train_as", "logical_axis_rules"}
    assert len({frozenset(f.keys() - others) for f in models.values()}) == 1
