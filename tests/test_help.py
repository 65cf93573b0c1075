"""What a person asks maxconv: its help, the pages of the guide, and flags from a file."""

import re
from pathlib import Path

import pytest

from maxconv import cli
from maxconv.config import Config
from maxconv.config.options import KEYS, OPTIONS
from maxconv.config.tables import defaults, maxtext_keys

ROOT = Path(__file__).parents[1]
TOPICS = sorted(page.stem for page in (ROOT / "maxconv/guide").glob("*.md"))


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    return capsys.readouterr().out


def test_every_command_has_help_with_its_own_options(capsys: pytest.CaptureFixture[str]) -> None:
    usage = printed(capsys, "--help")
    for name in cli.COMMANDS:
        assert f"  maxconv {name} " in usage
        text = printed(capsys, name, "--help")
        assert text.startswith(f"maxconv {name} ") and max(map(len, text.splitlines())) <= 100
        listed = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
        assert listed == {flag for flag, option in OPTIONS.items() if name in option.commands}


def test_options_are_those_of_the_config() -> None:
    fields = Config.__dataclass_fields__
    assert OPTIONS.keys() <= fields.keys()
    known = {key for key in KEYS if "*" not in key}
    assert known <= {*defaults(), *maxtext_keys()}


@pytest.mark.parametrize("topic", TOPICS)
def test_pages_of_the_guide(topic: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / f"maxconv/guide/{topic}.md").read_text()
    assert printed(capsys, "help", topic) == page
    assert f"maxconv/guide/{topic}.md" in (ROOT / "README.md").read_text()


def test_help_about_nothing_known(capsys: pytest.CaptureFixture[str]) -> None:
    for topic in ("bogus", "../README", "/etc/passwd"):
        assert cli.main(["help", topic]) == 2
        assert f"topics are {', '.join(TOPICS)}" in capsys.readouterr().err


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_flags_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "flags"
    file.write_text("# of a llama\n--save_dtype=int7\nscan_layers=maybe\n")
    assert cli.main(["plan", f"--flagfile={file}", "hardware=cpu"]) == 2
    told = capsys.readouterr().err
    assert "scan_layers=maybe" in told
    file.write_text("--save_dtype=int7\n")
    assert cli.main(["plan", f"--flagfile={file}", "hardware=cpu"]) == 2
    assert "save_dtype=int7 is not one of" in capsys.readouterr().err
    assert cli.main(["plan", f"--flagfile={tmp_path / 'none'}"]) == 2
    assert "--flagfile cannot be read" in capsys.readouterr().err
