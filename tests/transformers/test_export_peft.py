"""PEFT itself loads the adapters that are exported, and adds what they say."""

import json
import sys
import warnings
from importlib import import_module  # where types are checked, none of them is installed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny  # noqa: E402
from test_export import export  # noqa: E402
from test_export_lora import adapter, words  # noqa: E402

torch: Any = import_module("torch")
transformers: Any = import_module("transformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    peft: Any = import_module("peft")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what PEFT uses of transformers
@pytest.mark.parametrize(
    ("case", "name", "scan", "targets"),
    [
        ("llama3.1-8b", "linear", True, 7),
        ("llama3.1-8b", "some", False, 4),  # full names, as not all layers have them
        ("gemma3-4b", "language", True, None),
        ("qwen3-next-80b-a3b", "attention", False, None),
    ],
)
def test_peft_adds_what_is_exported(case, name, scan, targets, tmp_path: Path) -> None:
    lora, trained = adapter(case, name, scan, tmp_path, "float32")
    model, back = tiny.write(case, tmp_path / "hf", "float32"), tmp_path / "back"
    assert export(trained, model, back, *words(case, scan)) == 0
    said = json.loads((back / "adapter_config.json").read_text())
    assert targets in (None, len(said["target_modules"]))
    kind = getattr(transformers, tiny.CASES[case].config["architectures"][0])
    base = kind.from_pretrained(said["base_model_name_or_path"], dtype=torch.float32)
    want = {name: tensor.numpy().copy() for name, tensor in base.state_dict().items()}
    adapted = peft.PeftModel.from_pretrained(base, str(back))  # warns of keys it does not find
    parts = load_file(back / "adapter_model.safetensors")
    given = load_file(lora / "adapter_model.safetensors")
    assert len(parts) == len(given)
    for part in [part for part in parts if ".lora_A." in part]:
        a, b = (parts[p].astype(np.float64) for p in (part, part.replace("lora_A", "lora_B")))
        module = part.removeprefix("base_model.model.").partition(".lora_")[0]
        want[f"{module}.weight"] = want[f"{module}.weight"] + 6 / tiny.RANK * (b @ a)
    found = adapted.merge_and_unload().state_dict()
    assert found.keys() == want.keys()
    for tensor, x in want.items():
        np.testing.assert_allclose(found[tensor].numpy(), x, rtol=1e-5, atol=1e-5, err_msg=tensor)
