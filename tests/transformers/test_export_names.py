"""The names that an export gives tensors are those that transformers has in memory, and load."""

import json
import re
import sys
from importlib import import_module  # where types are checked, neither is installed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny  # noqa: E402

from maxconv.algebra import evaluate  # noqa: E402
from maxconv.errors import UserError  # noqa: E402
from maxconv.models.architecture import family_of  # noqa: E402
from maxconv.models.views import View, in_memory, unpacked  # noqa: E402
from maxconv.sources import LocalSource  # noqa: E402

torch: Any = import_module("torch")
transformers: Any = import_module("transformers")
UNKNOWN = ("deepseek4-284b", "qwen3-omni-30b-a3b", "weaver-mini")
# What transformers does not load of the tiny checkpoints: layers for multi-token prediction, keys
# and values that layers share; and the last layer of gemma4, if it should be of another kind there.
NOT_LOADED = {
    "deepseek3-671b": r"model\.layers\.4\..*",
    "gemma4-e2b": r".*\.(k_proj|v_proj|k_norm)\.weight",
    "gemma4-e4b": r".*\.(k_proj|v_proj|k_norm)\.weight|.*\.layers\.7\.self_attn\..*",
    "gemma4-31b": r".*\.layers\.13\.self_attn\..*",
}


def renamed(source: LocalSource) -> View:
    return in_memory(unpacked(source), source, family_of(source))


def kind(config: dict[str, Any]) -> Any:
    return getattr(transformers, config["architectures"][0])


@pytest.mark.parametrize("case", [case for case in tiny.CASES if case not in UNKNOWN])
def test_names_and_shapes_are_those_in_memory(case: str, tmp_path: Path) -> None:
    model = tiny.write(case, tmp_path)
    with LocalSource(model) as source:
        ours = {name: info.shape for name, info in renamed(source).tensors.items()}
    config = {k: v for k, v in tiny.CASES[case].config.items() if k != "quantization_config"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        made = kind(config)(transformers.AutoConfig.from_pretrained(tmp_path))
    theirs = {name: tuple(tensor.shape) for name, tensor in made.state_dict().items()}
    for name, shape in ours.items():
        if not re.fullmatch(NOT_LOADED.get(case, "no tensor"), name):
            assert theirs.get(name) == shape, name


@pytest.mark.parametrize("case", UNKNOWN)
def test_names_that_are_not_known_are_refused(case: str, tmp_path: Path) -> None:
    with LocalSource(tiny.write(case, tmp_path)) as source:
        with pytest.raises(UserError, match="not known"):
            renamed(source)


@pytest.mark.parametrize(
    "case",
    *[("mixtral-8x7b", "gemma3-4b+vision", "qwen3-30b-a3b", "qwen3-vl-30b-a3b", "qwen3.5-35b-a3b")],
)
def test_a_checkpoint_with_these_names_loads(case: str, tmp_path: Path) -> None:
    model = tiny.write(case, tmp_path / "a", "float32")
    other = tiny.write(case, tmp_path / "b", "float32")
    with LocalSource(model) as source:
        arrays = {name: source.tensor(name) for name in source.tensors}
        tensors = {name: evaluate(x, arrays) for name, x in renamed(source).weights.items()}
    for file in other.glob("*.safetensors*"):
        file.unlink()
    whole = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    save_file(whole, other / "model.safetensors", {"format": "pt"})
    load = kind(dict(tiny.CASES[case].config)).from_pretrained
    want, got = (load(at, dtype="float32", output_loading_info=True) for at in (model, other))
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert got[1][key] == want[1][key], key
    assert not got[1]["unexpected_keys"] and not got[1]["mismatched_keys"]
    for (name, x), y in zip(
        want[0].state_dict().items(), got[0].state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
