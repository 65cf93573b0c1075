"""Checkpoints of one architecture under the names of several releases of transformers."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
from headers import HeaderSource, published
from jobs import evaluated
from safetensors.numpy import load_file, save_file

from maxconv.config.tables import model_facts, trained_models
from maxconv.families.blocks import GATED
from maxconv.models.resolve import resolve
from maxconv.models.training import training

# How the names begin in the published files, and in those that other releases write.
RELEASES = [
    (
        "gemma3-4b",
        {
            "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    ),
    (
        "gemma3-4b",
        {
            "language_model.model.": "model.language_model.",
            "vision_tower.vision_model.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    ),
    ("gemma3-4b", {"vision_tower.vision_model.": "vision_tower."}),
]


@pytest.mark.parametrize(("model_name", "names"), RELEASES)
def test_other_names_are_the_same_model(model_name, names):
    source = published(model_name)
    other = renamed(source, names)
    assert other.tensors.keys() != source.tensors.keys()
    words, facts = {"use_multimodal": True}, model_facts(model_name)
    ours, theirs = (resolve(s, model_name, facts, words) for s in (source, other))
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensor in ours.tensors.items():
        assert theirs.tensors[name].shape == tensor.shape
    assert any("are read as" in notice for notice in theirs.notices)


def test_a_name_that_only_the_converter_has_is_trained_with_the_other():
    name = "qwen3-coder-480b-a35b"
    source = published(name)
    model = resolve(source, name, model_facts(name))
    told = training(model, source.config, trained_models(), name, {"scan_layers": True})
    assert told.arguments["model_name"] == "qwen3-480b-a35b"


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("mixtral-8x7b", ("w1", "w3", "w2")),
        ("qwen3-30b-a3b", GATED),
        ("qwen3-next-80b-a3b", GATED),
        ("qwen3-omni-30b-a3b", GATED),
    ],
)
def test_experts_of_one_tensor_are_the_same_experts(case, parts, tmp_path):
    """transformers 5 holds the experts of a layer in two tensors, gate above up."""
    model = tiny.write(case, tmp_path / "hf", shard_bytes=None)
    apart = load_file(model / "model.safetensors")
    want = made(case, model, tmp_path, scan=tiny.CASES[case].scans)
    fused = {name: x for name, x in apart.items() if ".experts." not in name}
    for at in {n.partition(".experts.")[0] + ".experts" for n in apart if ".experts." in n}:
        gate, up, down = (
            np.stack([apart[f"{at}.{e}.{part}.weight"] for e in range(5)]) for part in parts
        )
        fused[f"{at}.gate_up_proj"] = np.concatenate([gate, up], 1)
        fused[f"{at}.down_proj"] = down
    other = {name.replace("block_sparse_moe", "mlp"): x for name, x in fused.items()}
    save_file(other, model / "model.safetensors")
    got = made(case, model, tmp_path, scan=tiny.CASES[case].scans)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []


def test_experts_with_rows_and_columns_exchanged_are_the_same_experts(tmp_path):
    """transformers 5 writes them as it has them in memory."""
    case = "qwen3-vl-30b-a3b"
    model = tiny.write(case, tmp_path / "hf", shard_bytes=None)
    want = made(case, model, tmp_path, scan=False)
    tensors = load_file(model / "model.safetensors")
    for name, x in tensors.items():
        if ".experts." in name:
            tensors[name] = np.ascontiguousarray(x.swapaxes(1, 2))
    save_file(tensors, model / "model.safetensors")
    got = made(case, model, tmp_path, scan=False)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []


def test_deepseek4_as_transformers_writes_it_is_the_same_model(tmp_path):
    case = "deepseek4-284b"
    model = tiny.write(case, tmp_path / "hf", shard_bytes=None)
    want = made(case, model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    others = {
        name
        if name.startswith("head.")
        else "model."
        + name.replace("attn.kv_norm.", "attn.norm.")
        .replace("hc_head_", "hc_head.hc_")
        .replace("embed.", "embed_tokens."): x
        for name, x in tensors.items()
        if not name.startswith("mtp.")
    }
    save_file(others, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    hashed = config.pop("num_hash_layers")
    routed = config["num_hidden_layers"] - hashed
    config["mlp_layer_types"] = ["hash_moe"] * hashed + ["moe"] * routed
    (model / "config.json").write_text(json.dumps(config))
    got = made(case, model, tmp_path)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []


def made(case, model, directory, scan=True):
    return evaluated(directory, model, tiny.maxtext_words(case, scan))


def renamed(source, names):
    def other(name):
        return next((b + name[len(a) :] for a, b in names.items() if name.startswith(a)), name)

    infos = [replace(info, name=other(info.name)) for info in source.tensors.values()]
    return HeaderSource(source.root, source.config, infos)
