"""What sizes a checkpoint has that its published model has not, and what then is exported."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_export import converted, export, numbers, read

from maxconv import cli
from maxconv.config import parse
from maxconv.jobs.recorded import with_model
from maxconv.sources.trees import TreeSource


def shortened(case: str, scan: bool, directory: Path, layers: int) -> tuple[Path, Path]:
    """A model, and a checkpoint of MaxText of its first layers."""
    unit = 2 if case.startswith("gemma2") else 1
    return converted(case, scan, directory, f"base_num_decoder_layers={layers // unit}")


SLOW = (
    *(("deepseek3-671b", False, 3), ("gemma2-2b", True, 2), ("olmo3-7b", True, 2)),
    *(("qwen3-next-80b-a3b", False, 2), ("weaver-mini", False, 2)),
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


def with_spare_rows() -> tiny.Case:
    """Gemma 3 has 64 rows for no token, which MaxText's table has not (here its table has 195)."""
    case = tiny.CASES["gemma3-4b"]
    return replace(case, words={**case.words, "vocab_size": 195})


def test_rows_that_were_cut_are_those_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tiny.CASES, "gemma3-4b,cut", with_spare_rows())
    model, out = converted("gemma3-4b,cut", True, tmp_path)
    with TreeSource(str(out)) as tree:
        assert tree.tensors["token_embedder.embedding"].shape[0] == 195
    assert export(out, model, tmp_path / "back") == 0
    said = "the last 64 rows of language_model.model.embed_tokens.weight are not in the checkpoint"
    assert said in capsys.readouterr().err
    before, after = read(model), read(tmp_path / "back")
    assert after.keys() == before.keys()
    name = "language_model.model.embed_tokens.weight"
    (ours, theirs) = (numbers(found[name]).reshape(259, -1) for found in (after, before))
    np.testing.assert_array_equal(ours[195:], theirs[195:])
    np.testing.assert_allclose(ours[:195], theirs[:195], rtol=2**-7)


def test_contradictions_are_told_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the checkpoint, of MODEL, and of model_name: sizes, each once, whatever tensor has it."""
    _, out = converted("qwen3-0.6b", True, tmp_path)
    larger = tmp_path / "larger"
    case = tiny.CASES["qwen3-0.6b"]
    text = json.dumps([case.config, case.tensors])
    config, tensors = json.loads(text.replace("42", "46").replace("52", "56"))
    model = tiny.write(replace(case, config=config, tensors=tensors), larger)
    assert export(out, model, tmp_path / "back", "model_name=qwen3-0.6b") == 2
    said = capsys.readouterr().err
    assert "base_emb_dim=1024 of qwen3-0.6b contradicts hidden_size=46 in config.json" in said
    for ours, theirs in ((42, 46), (52, 56)):
        assert said.count(f"{out}/0/items has {ours} where {model} has {theirs}: in 'decoder.") == 1
    assert said.count("\n") == 3
    assert not (tmp_path / "back").exists()


def test_the_model_that_it_was_converted_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It need not be given: maxconv.json has it; then model_name; then a sentence asks for it."""
    model, out = converted("qwen3-0.6b", True, tmp_path)
    given = ["export", str(out), f"base_output_directory={tmp_path / 'back'}", "hardware=cpu"]
    assert cli.main(given) == 0
    said = f"names and small files are those of {model}, which it was converted from"
    assert said in capsys.readouterr().err
    assert read(tmp_path / "back") == read(model)
    model.rename(tmp_path / "moved")
    assert cli.main([*given, "--overwrite"]) == 2
    asked = f"--hf_model_path= or model_name=: it was converted from {model}, which is not here"
    assert asked in capsys.readouterr().err
    (out / "maxconv.json").unlink()
    assert cli.main([*given, "--overwrite"]) == 2
    assert "with --hf_model_path= or model_name=." in capsys.readouterr().err
    with TreeSource(str(out)) as tree:
        config, notices = with_model(parse(["model_name=qwen3-0.6b"]), tree)
        assert config.hf_model_path is None and "Qwen/Qwen3-0.6B" in notices[0]


def layer(name: str) -> int:
    """The number of the decoder layer of a tensor, -1 of others."""
    _, found, rest = f".{name}".partition(".layers.")
    is_other = "vision" in name or "visual" in name or "audio" in name
    number = rest.partition(".")[0]
    return int(number) if found and not is_other and number.isdecimal() else -1
