"""Files that make no sense end a plan with a sentence and exit code 2, at once."""

import json
import math
import time
from dataclasses import fields
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from jobs import CPU, evaluated
from plans import make_plan
from safetensors.numpy import load_file, save_file

from maxconv import cli
from maxconv.config import parse
from maxconv.config.mesh import make_mesh
from maxconv.config.tables import model_facts
from maxconv.errors import UserError
from maxconv.families import stated
from maxconv.models import schema
from maxconv.models.adapters import adapter_model
from maxconv.models.lora import alphas
from maxconv.models.resolve import Model, resolve
from maxconv.sources import Source, open_source

HUGE = 10**9
LLAMA = "llama3.1-8b"


def change(path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


class Planned:
    """A command that plans, and the sentences with which it is refused."""

    def __init__(self, capsys: pytest.CaptureFixture[str]):
        self.capsys = capsys

    def refused(self, *words: str) -> list[str]:
        self.capsys.readouterr()
        before = time.monotonic()
        code = cli.main(["plan", *CPU, *words])
        out, err = self.capsys.readouterr()
        assert (code, out) == (2, ""), err
        assert time.monotonic() - before < 60
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert lines and all(line.startswith("maxconv: ") for line in lines), err
        return [line.removeprefix("maxconv: ") for line in lines]


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str]) -> Planned:
    return Planned(capsys)


@pytest.mark.parametrize("case", tiny.CASES)
@pytest.mark.parametrize("value", [HUGE, 4096])
def test_every_size_of_every_family(case: str, value: int, tmp_path) -> None:
    """Each too large for the checkpoint: refused at once, unless nothing is made of it."""
    with open_source(str(tiny.write(case, tmp_path, shard_bytes=None))) as source:
        typed = tiny.CASES[case].words
        words = {key: typed[key] for key in ("use_multimodal", "use_audio") if key in typed}
        model = resolve(source, words=words)
        want = planned_leaves(source, model)
        original, before = source.config, time.monotonic()
        for f in fields(model.family.sizes):
            for key in stated(original, f.metadata["hf"]) if f.type is int else ():
                source.config = with_entry(original, key, value)
                try:
                    got = planned_leaves(source, resolve(source, words=words))
                except UserError:
                    continue
                assert got == want, f"{key}={value} makes another plan"
        assert time.monotonic() - before < 60


def planned_leaves(source: Source, model: Model) -> list[tuple[str, tuple[int, ...]]]:
    config = parse(["hardware=cpu"], {})
    mesh = make_mesh(config, jax.devices()[:1])
    plan = make_plan(source, model, mesh, config.logical_axis_rules, None)
    return [(leaf.name, leaf.shape) for leaf in plan.leaves]


def with_entry(config: dict[str, Any], key: str, value: int) -> dict[str, Any]:
    """A config.json with another entry, found as `stated` finds it."""
    changed = json.loads(json.dumps(config))
    *outer, last = key.split(".")
    view = changed
    for nested in ("thinker_config", "text_config"):
        if (outer[0] if outer else last) not in view and nested in view:
            view = view[nested]
    for name in outer:
        view = view[name]
    view[last] = value
    return changed


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"architectures": 5}, "architectures=5 is not a list of names"),
        ({"architectures": {"a": 1}}, "is not a list of names"),
        ({"architectures": [5]}, "is not a list of names"),
        ({"text_config": [1]}, "text_config=[1] is not an object"),
        ({"text_config": 5}, "text_config=5 is not an object"),
        ({"text_config": {"hidden_size": []}, "hidden_size": None}, "hidden_size=[] is not"),
        ({"thinker_config": {"text_config": "x"}}, 'text_config="x" is not an object'),
        ({"quantization_config": "fp8"}, 'quantization_config="fp8" is not an object'),
        ({"num_hidden_layers": HUGE}, "is not a whole number from 1 to 4096"),
        (
            {"num_hidden_layers": 4},
            "ask for 4 layers model.layers.*, but the checkpoint has tensors of 3",
        ),
        ({"num_hidden_layers": 3.0}, "num_hidden_layers=3.0 is not a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=true is not a whole number"),
        ({"hidden_size": float("nan")}, "hidden_size=NaN is not a whole number"),
        ({"hidden_size": 10**400}, "is not a whole number"),
        ({"hidden_size": 5, "head_dim": None}, "head_dim is absent and would be 0"),
    ],
)
def test_entries_of_config(entries: dict[str, Any], said: str, tmp_path, planned: Planned) -> None:
    model = tiny.write(LLAMA, tmp_path)
    change(model / "config.json", **entries)
    assert any(said in problem for problem in planned.refused(f"--hf_model_path={model}"))


@pytest.mark.parametrize(
    "size", [0, [0, 0], [-1, 128], ["128", "128"], [128.0, 128], [128], [128] * 3, [True, True], {}]
)
def test_sizes_of_fp8_blocks(size: Any, tmp_path, planned: Planned) -> None:
    case = next(name for name, case in tiny.CASES.items() if "fp8" in name)
    model = tiny.write(case, tmp_path)
    quantization = json.loads((model / "config.json").read_text())["quantization_config"]
    change(model / "config.json", quantization_config=quantization | {"weight_block_size": size})
    (problem,) = planned.refused(f"--hf_model_path={model}")
    assert "weight_block_size=" in problem and "is not two positive whole numbers" in problem


@pytest.mark.parametrize("case", tiny.CASES)
def test_few_layers(case: str, tmp_path, planned: Planned) -> None:
    """Fewer than a cycle of a family, and than the entries of its layer_types."""
    model = tiny.write(case, tmp_path, shard_bytes=None)
    config = json.loads((model / "config.json").read_text())
    has = (config.get("thinker_config") or config).get("text_config", config)
    has["num_hidden_layers"] = 1
    (model / "config.json").write_text(json.dumps(config))
    for scan in ("true", "false"):
        planned.refused(f"--hf_model_path={model}", f"scan_layers={scan}")  # or no use for tensors


@pytest.mark.parametrize(
    "name", ["model.layers.²", "model.layers.²." + "x", "model.layers.٣.x", "a\0b", "{e}", "{0}"]
)
@pytest.mark.parametrize("number", ["", ".mlp.up_proj.weight"])
def test_names_of_tensors(name: str, number: str, tmp_path, planned: Planned) -> None:
    model = tiny.write(LLAMA, tmp_path, shard_bytes=None)
    tensors = load_file(model / "model.safetensors")
    extra = {name + number: np.zeros((2, 2), np.float32), "9" * 5000: np.zeros(1, np.float32)}
    extra[f"model.layers.{'9' * 5000}.x"] = np.zeros(1, np.float32)
    save_file(tensors | extra, model / "model.safetensors")
    found = planned.refused(f"--hf_model_path={model}", "base_num_decoder_layers=2")
    assert any("has no counterpart" in problem for problem in found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["vocab_size=2147483647"], "vocab_size=2147483647 contradicts vocab_size=259"),
        (["base_num_decoder_layers=4096", "override_model_config=True"], "contradicts"),
        (["mtp_num_layers=4000"], "no such part"),
    ],
)
def test_sizes_that_are_typed(words: list[str], said: str, tmp_path, planned: Planned) -> None:
    model = tiny.write(LLAMA, tmp_path)
    found = planned.refused(f"--hf_model_path={model}", *words)
    assert any(said in problem for problem in found), found


# Adapters.


def adapter(directory, **config: Any):
    path = tiny.write_adapter(LLAMA, "some", directory / "adapter")
    change(path / "adapter_config.json", **config)
    return path


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha=NaN is not a finite number"),
        ({"lora_alpha": float("inf")}, "lora_alpha=Infinity is not a finite number"),
        ({"lora_alpha": 1e39}, "is not a finite number"),  # infinite as a float32
        ({"lora_alpha": 10**400}, "is not a finite number"),
        ({"lora_alpha": "6"}, 'lora_alpha="6" is not a finite number'),
        ({"lora_alpha": True}, "lora_alpha=true is not a finite number"),
        ({"r": 0}, "r=0 is not a rank"),
        ({"r": "4"}, 'r="4" is not a rank'),
        ({"alpha_pattern": ["q_proj"]}, "is not an object of finite numbers"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "is not an object of finite numbers"),
        ({"rank_pattern": {"q_proj": None}}, "is not an object of ranks"),
        ({"peft_type": 5}, "peft_type=5 is not a string"),
        ({"bias": []}, "bias=[] is not a string"),
        ({"use_rslora": "yes"}, "is not true or false"),
    ],
)
def test_entries_of_adapters(config: dict[str, Any], said: str, tmp_path, planned: Planned) -> None:
    model, lora = tiny.write(LLAMA, tmp_path / "hf"), adapter(tmp_path, **config)
    merged = [f"--hf_model_path={model}", f"hf_lora_adapter_path={lora}"]
    alone = [*tiny.maxtext_words(LLAMA, True), f"hf_lora_adapter_path={lora}"]
    for words in (merged, alone):
        assert any(said in problem for problem in planned.refused(*words))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*x",
        "(a|b)" * 25,
        "(.*a){20}",
        "a?" * 40 + "a" * 40,
        ".*.*.*.*.*.*x",
        "(",
        "*",
        "[a",
        "(?i)q_proj",
        r"(q)\1",
        "a" * 1000,
        "(?=.*)q_proj",
    ],
)
def test_patterns_that_may_not_end(pattern: str, tmp_path, planned: Planned) -> None:
    lora = adapter(tmp_path, alpha_pattern={pattern: 3})
    model = tiny.write(LLAMA, tmp_path / "hf")
    (problem,) = planned.refused(f"--hf_model_path={model}", f"hf_lora_adapter_path={lora}")
    assert "alpha_pattern" in problem and problem.endswith("merge it with PEFT first.")


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        ("model.layers.0.self_attn.q_proj", True),
        (r"^model\.layers\.0\..*", True),
        ("^layers.0.self_attn.q_proj", False),
        (r"layers\.\d+\.self_attn\.(k|q)_proj$", True),
        (".*layers.[01].*q_proj", True),
        ("layers.0", False),
    ],
)
def test_the_first_pattern_that_fits_counts_as_in_peft(pattern: str, fits: bool) -> None:
    config = {"lora_alpha": 6, "alpha_pattern": {pattern: 2, "self_attn.[kq]_proj": 3}}
    assert alphas(config)("model.layers.0.self_attn.q_proj") == (2 if fits else 3)
    assert alphas(config)("vision.layers.0.fc1") == 6


def test_patterns_are_for_the_names_that_the_adapter_has(tmp_path) -> None:
    """Not for those of the table: Gemma 3's checkpoints have others."""
    model = tiny.write("gemma3-4b", tmp_path / "hf", shard_bytes=None)
    lora = tiny.write_adapter("gemma3-4b", "language", tmp_path / "adapter")
    names = [n for n in load_file(lora / "adapter_model.safetensors") if "q_proj.lora_A" in n]
    module = names[0].removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    assert not module.startswith("model.layers.")
    alone: list[np.ndarray] = []
    for patterns in ({}, {f"^{module}": 12}):
        change(lora / "adapter_config.json", alpha_pattern=patterns)
        words = [*tiny.maxtext_words("gemma3-4b", False), "--save_dtype=float32"]
        made = evaluated(tmp_path, model, words, [f"hf_lora_adapter_path={lora}"])
        (leaf,) = (x for n, x in made.items() if "layers_0.self_attention.query.kernel" in n)
        alone.append(leaf)
    stored = load_file(model / "model.safetensors")[f"{module}.weight"]
    plain = stored.astype(np.float32).T.reshape(alone[0].shape)
    np.testing.assert_allclose(alone[1] - plain, 2 * (alone[0] - plain), rtol=1e-3, atol=1e-5)


def test_an_adapter_of_too_large_a_model(tmp_path) -> None:
    name = "qwen3-30b-a3b"
    words = {"base_num_decoder_layers": 4096, "num_experts": 65_536}
    source = open_source(str(adapter(tmp_path)), config="adapter_config.json")
    with pytest.raises(UserError, match="4096 layers and 65536 experts"):
        adapter_model(source, name, model_facts(name), words, True)


def test_weights_that_come_twice(tmp_path, planned: Planned) -> None:
    model = tiny.write("qwen3-30b-a3b", tmp_path, shard_bytes=None)
    tensors = load_file(model / "model.safetensors")
    gate = tensors["model.layers.0.mlp.experts.0.gate_proj.weight"]
    fused = np.zeros((5, 2 * gate.shape[0], gate.shape[1]), ml_dtypes.bfloat16)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = fused
    save_file(tensors, model / "model.safetensors")
    (problem,) = planned.refused(f"--hf_model_path={model}")
    assert problem.endswith("are the same tensor.")


def test_no_experts_without_end(tmp_path, planned: Planned) -> None:
    model = tiny.write("qwen3-30b-a3b", tmp_path, shard_bytes=None)
    tensors = load_file(model / "model.safetensors")
    empty = np.zeros((10**12, 0, 4), np.float32)
    save_file(
        tensors | {"model.layers.0.mlp.experts.gate_up_proj": empty}, model / "model.safetensors"
    )
    (problem,) = planned.refused(f"--hf_model_path={model}")
    assert "without values ('model.layers.0.mlp.experts.gate_up_proj')" in problem


def test_numbers_are_those_of_a_float32() -> None:
    assert schema.NUMBER.fits(1e38) and not schema.NUMBER.fits(math.inf)
    assert np.isfinite(np.float32(schema._LARGEST))
