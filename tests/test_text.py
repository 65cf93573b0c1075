"""Text from files and servers is shown, and cannot do anything to a terminal."""

import ast
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from jobs import CPU
from safetensors.numpy import load_file, save_file

import maxconv
from maxconv import cli
from maxconv.errors import UserError, failure_text, problems_text
from maxconv.text import note, printable, printable_lines, say

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


def test_one_printer() -> None:
    """What prints makes printable; a service's pipe to the process that started it is no output."""
    package = Path(maxconv.__file__).parent
    printing = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Name) and node.id == "print"
    }
    assert printing == {"text.py", "processes/coordinator.py"}


def test_what_is_said_is_printable(capsys) -> None:
    say(f"{EVIL}\nb\n")
    say(EVIL, sys.stderr)
    note(f"{EVIL}\nb")
    shown = printable(EVIL)
    assert capsys.readouterr() == (f"{shown}\nb\n", f"{shown}\nnote: {shown}\\nb\n")


def test_the_page_of_a_plan(tmp_path) -> None:
    """A path may be no text; the page is UTF-8 all the same, whatever the locale."""
    model = tiny.write("llama3.1-8b", tmp_path / "\udce9 é \x1b[2J")
    page = tmp_path / "plan.html"
    assert cli.main(["plan", *CPU, f"--hf_model_path={model}", f"--report={page}"]) == 0
    text = page.read_bytes().decode()
    assert r"\udce9 é \x1b[2J" in text and "\x1b" not in text
