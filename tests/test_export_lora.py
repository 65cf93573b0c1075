"""LoRA adapters that MaxText trained: as PEFT saves them, or merged into the weights they adapt."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from jobs import CPU, MESHES
from safetensors.numpy import load_file
from test_export import converted, export, numbers, read

from maxconv.config import parse
from maxconv.jobs import convert

SLOW = pytest.mark.slow
Arrays = dict[str, np.ndarray]


def words(case: str, scan: bool) -> list[str]:
    return [w for w in tiny.maxtext_words(case, scan) if not w.startswith("scan_layers")]


def adapter(case: str, name: str, scan: bool, directory: Path, dtype: str) -> tuple[Path, Path]:
    """An adapter of PEFT, and what MaxText has of it."""
    lora = tiny.write_adapter(case, name, directory / "lora")
    given = [*tiny.maxtext_words(case, scan), *CPU, *MESHES["fsdp8"], "--verify=none"]
    given += [f"hf_lora_adapter_path={lora}", f"base_output_directory={directory / 'adapter'}"]
    done = convert.run(parse([*given, f"--save_dtype={dtype}"]))
    return lora, Path(done.config.base_output_directory)


@pytest.mark.parametrize(
    ("case", "name", "scan", "dtype"),
    [
        ("qwen3-8b", "linear", True, "bfloat16"),
        ("llama3.1-8b", "some", False, "float32"),
        pytest.param("qwen3-30b-a3b", "linear", True, "bfloat16", marks=SLOW),
        pytest.param("mixtral-8x7b", "experts", False, "bfloat16", marks=SLOW),
        pytest.param("deepseek2-16b", "attention", True, "float32", marks=SLOW),
        pytest.param("gemma3-4b", "language", True, "bfloat16", marks=SLOW),
        pytest.param("qwen3-next-80b-a3b", "attention", True, "bfloat16", marks=SLOW),
    ],
)
def test_an_adapter_comes_back(case, name, scan, dtype, tmp_path: Path) -> None:
    """Bit for bit, in the dtype in which MaxText has it."""
    lora, trained = adapter(case, name, scan, tmp_path, dtype)
    model, back = tiny.write(case, tmp_path / "hf"), tmp_path / "back"
    assert export(trained, model, back, *words(case, scan)) == 0
    assert sorted(p.name for p in back.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    want, got = (load_file(at / "adapter_model.safetensors") for at in (lora, back))
    if case.startswith("gemma3"):  # as transformers 5 has it in memory
        want = {
            n.replace("language_model.model", "model.language_model"): x for n, x in want.items()
        }
    assert got.keys() == want.keys()
    for tensor, x in want.items():
        expected = x.astype(tiny.DTYPES[dtype])
        if case.startswith("llama") and ".q_proj.lora_B" in tensor:
            np.testing.assert_allclose(got[tensor], expected, rtol=2e-7)
        else:
            assert got[tensor].tobytes() == expected.tobytes(), tensor
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (tiny.RANK, 6, "LORA")


MERGED = [
    ("llama3.1-8b", "linear", True, "float32", ()),
    ("qwen3-vl-2b", "vision", False, "bfloat16", ("use_multimodal=True",)),
    ("llama3.1-8b", "some", False, "bfloat16", ()),
    ("mixtral-8x7b", "experts", True, "float32", ("--names=transformers",)),
    ("mixtral-8x7b", "experts", False, "bfloat16", ()),
    ("deepseek2-16b", "attention", True, "bfloat16", ()),
    ("gemma2-2b", "linear", True, "float32", ()),
]


@pytest.mark.parametrize(
    ("case", "name", "scan", "dtype", "more"),
    [*MERGED[:1], *(pytest.param(*m, marks=SLOW) for m in MERGED[1:])],
)
def test_an_adapter_is_merged(case, name, scan, dtype, more, tmp_path: Path) -> None:
    """Into what is exported without it: W + alpha / r * B A, rounded once."""
    model, out = converted(case, scan, tmp_path, "--save_dtype=float32")
    lora, trained = adapter(case, name, scan, tmp_path, "float32")
    given = [w for w in words(case, scan) if not w.startswith("use_")]
    plain, back = tmp_path / "plain", tmp_path / "back"
    assert export(out, model, plain, "--save_dtype=float32", *given) == 0
    merged = [f"lora.lora_restore_path={trained}", f"--save_dtype={dtype}"]
    merged += [word for word in more if word.startswith("--")]
    assert export(out, model, back, *merged, *given) == 0
    parts = load_file(lora / "adapter_model.safetensors")
    want = {n: numbers(x).reshape(x[1]) for n, x in read(plain).items()}
    for part in [part for part in parts if ".lora_A." in part]:
        a, b = (parts[p].astype(np.float64) for p in (part, part.replace("lora_A", "lora_B")))
        module = part.removeprefix("base_model.model.").partition(".lora_")[0]
        want[f"{module}.weight"] = want[f"{module}.weight"] + 6 / tiny.RANK * (b @ a)
    if "--names=transformers" in more:
        want = fused(want)
    found = read(back)
    assert found.keys() == want.keys()
    for tensor, x in want.items():
        got, eps = numbers(found[tensor]).reshape(x.shape), np.finfo(np.float32).eps
        if dtype == "bfloat16":  # half a step, where a whole one would be two roundings
            eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2
        np.testing.assert_allclose(got, x, rtol=1.01 * eps, atol=1e-5 * np.abs(x).max())


def fused(weights: Arrays) -> Arrays:
    """Mixtral's experts as transformers 5 has them in memory."""
    found = {name.replace("block_sparse_moe", "mlp"): x for name, x in weights.items()}
    for layer in {name.partition(".experts.")[0] for name in found if ".experts." in name}:
        experts = [
            [found.pop(f"{layer}.experts.{e}.w{i}.weight") for e in range(5)] for i in (1, 3, 2)
        ]
        gate, up, down = map(np.stack, experts)
        found[f"{layer}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{layer}.experts.down_proj"] = down
    return found
