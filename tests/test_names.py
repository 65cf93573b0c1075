"""Checkpoints of one architecture under the names of several releases of transformers."""

from dataclasses import replace

import numpy as np
import pytest
import tiny
from headers import HeaderSource, published
from jobs import job_words
from safetensors.numpy import load_file, save_file

from maxconv.config import parse
from maxconv.convert import prepared
from maxconv.engine import Engine
from maxconv.model import resolve
from maxconv.tables import model_facts

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


def test_a_name_that_only_the_converter_has_comes_with_the_other():
    name = "qwen3-coder-480b-a35b"
    model = resolve(published(name), name, model_facts(name))
    assert any("model_name=qwen3-480b-a35b" in notice for notice in model.notices)


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("mixtral-8x7b", ("w1", "w3", "w2")),
        ("qwen3-30b-a3b", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_experts_of_one_tensor_are_the_same_experts(case, parts, tmp_path):
    """transformers 5 holds the experts of a layer in two tensors, gate above up."""
    model = tiny.write(case, tmp_path / "hf", shard_bytes=None)
    apart = load_file(model / "model.safetensors")
    want = made(case, model, tmp_path)
    fused = {name: x for name, x in apart.items() if ".experts." not in name}
    for layer in range(tiny.CASES[case].config["num_hidden_layers"]):
        one = next(n for n in apart if f".{layer}." in n and ".experts.0." in n)
        at = one.rpartition(".experts.")[0] + ".experts"
        gate, up, down = (
            np.stack([apart[f"{at}.{e}.{part}.weight"] for e in range(5)]) for part in parts
        )
        fused[f"{at}.gate_up_proj"] = np.concatenate([gate, up], 1)
        fused[f"{at}.down_proj"] = down
    other = {name.replace("block_sparse_moe", "mlp"): x for name, x in fused.items()}
    save_file(other, model / "model.safetensors")
    got = made(case, model, tmp_path)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name].tobytes() != want[name].tobytes()] == []


def made(case, model, directory):
    words = job_words(directory, model, tiny.maxtext_words(case, True), "fsdp4_tp2")
    with prepared(parse(words)) as job, Engine(job.plan, job.source, window=1 << 20) as engine:
        return {leaf.name: np.asarray(engine.make(leaf)) for leaf in job.plan.leaves}


def renamed(source, names):
    def other(name):
        return next((b + name[len(a) :] for a, b in names.items() if name.startswith(a)), name)

    infos = [replace(info, name=other(info.name)) for info in source.tensors.values()]
    return HeaderSource(source.root, source.config, infos)
