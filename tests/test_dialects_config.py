"""config.json as other programs leave it: each kind over several families."""

import json
from pathlib import Path

import numpy as np
import pytest
from dialects import Checkpoint, same


@pytest.mark.parametrize("case", ["gemma4-31b", "gemma4-26b+vision", "gemma4-e4b"])
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
