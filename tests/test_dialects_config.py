"""config.json as other programs leave it: each kind over several families."""

import json
from pathlib import Path

import numpy as np
import pytest
from dialects import BF16, Checkpoint, same
from jobs import CPU, MESHES

from maxconv.config import parse
from maxconv.jobs.prepare import prepared

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "case",
    ["gemma4-e4b", *(pytest.param(f"gemma4-{n}", marks=SLOW) for n in ("31b", "26b+vision"))],
)
def test_sizes_of_single_layers_as_transformers_5_has_them(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    text = json.loads((c.hf / "config.json").read_text())["text_config"]
    own = {"head_dim": text.pop("global_head_dim")}
    if kv_heads := text.pop("num_global_key_value_heads", None):
        own["num_key_value_heads"] = kv_heads
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    digits = len(str(max(full)))
    outer = {"head_dim": text["head_dim"], "num_key_value_heads": text["num_key_value_heads"]}
    every = {str(i): own if i in full else outer for i in range(text["num_hidden_layers"])}
    for layers in (
        {str(i).zfill(digits): own for i in full},
        {str(i): own for i in full},
        {str(i).zfill(4): own for i in full},
        every,
    ):
        c.entries(text_config=text | {"per_layer_config": layers})
        same(c.converted()[0], plain)
    key = str(full[0])
    c.entries(text_config=text | {"per_layer_config": {key: own | {"head_dim": 20}}})
    assert f"contradicts per_layer_config.{key}.head_dim=20 in config.json" in c.refused()
    c.entries(text_config=text | {"per_layer_config": {}})
    assert "global_head_dim=18 contradicts head_dim=10 in config.json" in c.refused()
    c.entries(text_config=text)
    assert (
        "global_head_dim=18 contradicts global_head_dim=512, which is the default where "
        "config.json has no such entry"
    ) in c.refused()
    c.entries(text_config=text | {"per_layer_config": {key: 3}})
    assert f"per_layer_config.{key}=3 is not an object" in c.refused()


@pytest.mark.parametrize("case", ["deepseek3-671b", "deepseek3.2-671b"])
def test_layers_for_prediction_are_known_by_their_names(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    last = "model.layers.4"
    without = {n: x for n, x in c.tensors.items() if not n.startswith(last)}
    c.entries(num_nextn_predict_layers=None)
    c.save(without)
    plain, _ = c.converted()
    predicting = {n.replace("layers.3.", "layers.4."): x for n, x in without.items() if "s.3." in n}
    square = np.ones((42, 84), c.tensors["model.norm.weight"].dtype)
    for part in ("enorm", "hnorm", "shared_head.norm"):
        predicting[f"{last}.{part}.weight"] = c.tensors["model.norm.weight"]
    predicting[f"{last}.eh_proj.weight"] = square
    c.save({**without, **predicting})
    leaves, notices = c.converted()
    same(leaves, plain)
    assert any("add mtp_num_layers=1" in n for n in notices)
    leaves, _ = c.converted("mtp_num_layers=1")
    (made,) = [x for n, x in leaves.items() if n.endswith("mtp_1_projection.kernel")]
    np.testing.assert_array_equal(made, square.T)
    c.entries(num_nextn_predict_layers=1)
    c.save(without)  # as conversions to bfloat16 leave it
    leaves, notices = c.converted()
    same(leaves, plain)
    assert not any("mtp_num_layers" in n for n in notices)
    assert "as the tensors of the checkpoint have it" in c.refused("mtp_num_layers=1")


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen3-30b-a3b"])
def test_entries_that_come_twice_or_are_no_numbers(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    path = c.hf / "config.json"
    text = path.read_text().lstrip("{")
    harmless = ['"use_cache": false', '"x": NaN', '"y": -Infinity', '"hidden_size": 42']
    path.write_text("{" + ", ".join([*harmless, '"use_cache": true, "z": 1, "z": 2']) + "," + text)
    leaves, notices = c.converted()
    same(leaves, plain)
    assert any("'z' more than once" in n for n in notices)
    path.write_text('{"hidden_size": 43, ' + text)
    assert "it has several values of hidden_size" in c.refused()
    path.write_text('{"hidden_size": NaN}')
    assert "hidden_size=NaN is not a whole number" in c.refused()


@pytest.mark.parametrize("case", ["qwen3-30b-a3b", "qwen3-vl-30b-a3b", "qwen3-next-80b-a3b"])
@pytest.mark.parametrize("dense", [[0], [1], [0, 2]])
def test_layers_without_experts(case: str, dense: list[int], tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    prefix = next(n for n in c.tensors if "layers.0.mlp" in n).partition("layers.0.")[0]
    for layer in dense:
        at = f"{prefix}layers.{layer}.mlp."
        c.tensors = {n: x for n, x in c.tensors.items() if not n.startswith(at)}
        for part in ("gate_proj", "up_proj", "down_proj"):
            shape = (42, 52) if part == "down_proj" else (52, 42)
            c.tensors[f"{at}{part}.weight"] = np.zeros(shape, BF16)
    c.save()
    config = json.loads((c.hf / "config.json").read_text())
    if "text_config" in config:
        c.entries(text_config=config["text_config"] | {"mlp_only_layers": dense})
    else:
        c.entries(mlp_only_layers=dense)
    problem = c.refused()
    numbers = ", ".join(map(str, dense))
    assert f"layers {numbers} have no experts (mlp_only_layers={dense} in config.json)" in problem
    assert "\n" not in problem
    mend = "base_num_decoder_layers=1 converts those before"
    assert (mend in problem) == (dense == [1])


@pytest.mark.parametrize(
    ("case", "sizes"), [("llama3.1-8b", (60, 20, 20)), ("mistral-7b", (60, 20, 20))]
)
def test_biases_that_the_decoder_has_not(case: str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    layers = {n.split(".")[2] for n in c.tensors if n.startswith("model.layers.")}
    biases = {
        f"model.layers.{layer}.self_attn.{part}_proj.bias": np.ones(n, BF16)
        for layer in layers
        for part, n in zip("qkv", sizes, strict=True)
    }
    c.save({**c.tensors, **biases})
    problem = c.refused()
    assert len(problem.splitlines()) == 3
    assert "q_proj.bias and" in problem and "its tensors are those of Qwen2ForCausalLM" in problem
    more = {n.replace("q_proj", "o_proj"): np.ones(42, BF16) for n in biases if "q_proj" in n}
    c.save({**c.tensors, **biases, **more})
    problem = c.refused()
    assert "o_proj.bias and" in problem and "has no such bias" in problem
    c.save({**c.tensors, **biases})
    c.entries(architectures=["Qwen2ForCausalLM"])
    line = [
        f"--hf_model_path={c.hf}",
        f"base_output_directory={tmp_path}/o",
        *CPU,
        *MESHES["fsdp8"],
    ]
    with prepared(parse(line)) as job:
        assert any(leaf.name.endswith("query.bias") for leaf in job.plan.leaves)
