"""What sizes a checkpoint has that its published model has not, and what then is exported."""

import json
from pathlib import Path

import pytest
from test_export import converted, export, read

from maxconv import cli


def shortened(case: str, scan: bool, directory: Path, layers: int) -> tuple[Path, Path]:
    """A model, and a checkpoint of MaxText of its first layers."""
    unit = 2 if case.startswith("gemma2") else 1
    return converted(case, scan, directory, f"base_num_decoder_layers={layers // unit}")


SLOW = (
    *(("deepseek3-671b", False, 3), ("deepseek4-284b", True, 5), ("deepseek4-284b", False, 2)),
    *(("gemma2-2b", True, 2), ("gemma4-26b+vision", True, 2), ("olmo3-7b", True, 2)),
    *(("qwen3-next-80b-a3b", True, 2), ("qwen3.5-35b-a3b", True, 2)),
    *(("qwen3-omni-30b-a3b", False, 2), ("weaver-mini", False, 2)),
)
CASES = [
    *(("qwen3-0.6b", True, 2), ("gemma3-4b", False, 2)),
    *(pytest.param(*one, marks=pytest.mark.slow) for one in SLOW),
]


@pytest.mark.parametrize(("case", "scan", "layers"), CASES)
def test_the_first_layers(
    case: str, scan: bool, layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model that was cut for a test, config.json says how many layers it has."""
    model, out = shortened(case, scan, tmp_path, layers)
    assert export(out, model, tmp_path / "back") == 0
    said = capsys.readouterr().err
    before, after = read(model), read(tmp_path / "back")
    assert after.keys() == {name for name in before if layer(name) < layers}
    for name, want in after.items():
        assert before[name][:2] == want[:2]
    config = json.loads((tmp_path / "back/config.json").read_text())
    inner = config.get("thinker_config", config)
    assert inner.get("text_config", inner)["num_hidden_layers"] == layers
    assert f"config.json: num_hidden_layers is {layers} instead of" in said
    # What was exported is a model by itself.
    again = ["convert", f"--hf_model_path={tmp_path / 'back'}", "hardware=cpu"]
    again += [f"base_output_directory={tmp_path / 'again'}", f"scan_layers={scan}"]
    assert cli.main([*again, "--verify=none", "--simulated_cpu_devices_count=8"]) == 0


def layer(name: str) -> int:
    """The number of the decoder layer of a tensor, -1 of others."""
    _, found, rest = f".{name}".partition(".layers.")
    is_other = "vision" in name or "visual" in name or "audio" in name
    number = rest.partition(".")[0]
    return int(number) if found and not is_other and number.isdecimal() else -1
