"""Checkpoints of one architecture under the names of several releases of transformers."""

from dataclasses import replace

import pytest
from headers import HeaderSource, published

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


def renamed(source, names):
    def other(name):
        return next((b + name[len(a) :] for a, b in names.items() if name.startswith(a)), name)

    infos = [replace(info, name=other(info.name)) for info in source.tensors.values()]
    return HeaderSource(source.root, source.config, infos)
