"""Text from files and servers is shown, and cannot do anything to a terminal."""

import json
import sys

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from maxconv import cli
from maxconv.errors import UserError, failure_text, problems_text
from maxconv.text import printable, printable_lines

EVIL = "\x1b]0;owned\x07\x1b[2J\r\x00\x9b31m\u202eexe\u2028\ud800"


def test_nothing_that_a_terminal_obeys_is_left() -> None:
    shown = printable(EVIL)
    assert shown.isprintable() and shown.isascii()
    assert shown == r"\x1b]0;owned\x07\x1b[2J\r\x00\x9b31m\u202eexe\u2028\ud800"
    assert printable("Größe 12 µs, 模型") == "Größe 12 µs, 模型"
    assert printable_lines(f"a\n{EVIL}\n") == f"a\n{shown}\n"
    for c in map(chr, range(sys.maxunicode + 1)):
        assert c.isprintable() or c not in printable(c)


def test_long_text_keeps_its_beginning_and_its_end() -> None:
    shown = printable(f"tensor {'x' * 1_000_000} is missing; download it again", 100)
    assert shown.startswith("tensor xxx") and shown.endswith("; download it again")
    assert len(shown) < 150 and "999,9" in shown


def test_errors_are_printable() -> None:
    problems = [f"tensor {EVIL}\n{'x' * 1_000_000} is missing."] * 30
    for text in (problems_text(problems), failure_text(UserError(problems))):
        lines = text.split("\n")
        assert len(lines) == 21 and len(text) < 50_000
        assert all(line.isprintable() and line.startswith("maxconv: ") for line in lines)
    for error in (OSError(EVIL), ValueError(EVIL), RuntimeError("x" * 1_000_000)):
        text = failure_text(error)
        assert all(line.isprintable() for line in text.split("\n")) and len(text) < 10_000


@pytest.mark.parametrize("name", [EVIL.replace("\ud800", ""), "x" * 1_000_000])
def test_names_of_tensors(name: str, tmp_path, capsys) -> None:
    model = tiny.write("llama3.1-8b", tmp_path / "hf", shard_bytes=None)
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | {name: np.zeros(1, np.float32)}, model / "model.safetensors")
    assert cli.main(["inspect", str(model)]) == 0
    out = capsys.readouterr().out
    assert all(line.isprintable() for line in out.split("\n")) and len(out) < 50_000
    assert cli.main(["plan", f"--hf_model_path={model}", "hardware=cpu"]) == 2
    err = capsys.readouterr().err
    assert all(line.isprintable() for line in err.split("\n")) and len(err) < 5_000
    assert "has no counterpart" in err


def test_half_of_a_surrogate_pair(tmp_path, capsys) -> None:
    model = tiny.write("llama3.1-8b", tmp_path / "hf", shard_bytes=None)
    raw = (model / "model.safetensors").read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + n].replace(b'"model.norm.weight"', rb'"model.norm.\ud800"')
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header + raw[8 + n :])
    config = json.loads((model / "config.json").read_text())
    assert cli.main(["inspect", str(model)]) == 0
    assert r"model.norm.\ud800" in capsys.readouterr().out
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["Llama\ud800"]}))
    assert cli.main(["plan", f"--hf_model_path={model}", "hardware=cpu"]) == 2
    assert r"is a Llama\ud800" in capsys.readouterr().err
