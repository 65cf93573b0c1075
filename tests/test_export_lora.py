"""LoRA adapters that MaxText trained: as PEFT saves them, or merged into the weights they adapt."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from jobs import CPU, MESHES
from safetensors.numpy import load_file
from test_export import export

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
