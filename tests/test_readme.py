"""What the README and the guide say is so, and their commands run."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from maxconv.cli.family_tables import families_markdown, families_text
from maxconv.config.tables import known_models, model_facts
from maxconv.families import BY_ARCHITECTURE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "maxconv/guide").glob("*.md"))]


def blocks(page: Path, kind: str = "") -> list[str]:
    """The commands of a page: .ci/run runs `ci`, and `skip` need a network or a slice."""
    info = f"sh {kind}".rstrip()
    return re.findall(rf"^```{info}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_table_of_models_is_that_of_the_tables():
    assert families_markdown() in README


def test_every_model_is_listed_with_the_family_that_makes_it():
    listed = {line.split()[0]: line for line in families_text().splitlines()[1:]}
    assert set(listed) == set(known_models())
    for name, line in listed.items():
        facts = model_facts(name)
        assert facts is not None and facts["hf_id"] in line
        families = BY_ARCHITECTURE[facts["architecture"]]
        assert facts["decoder_block"] in [family.decoder_block for family in families]


def test_the_example_of_a_family_is_the_real_one():
    guide = (ROOT / "maxconv/guide/models.md").read_text()
    (example,) = re.findall(r"This is all of Mixtral:\n\n```python\n(.*?)```", guide, re.DOTALL)
    assert example in (ROOT / "maxconv/families/mixtral.py").read_text()


def test_the_versions_of_the_guide_are_those_that_ci_installs() -> None:
    """Of every library that has a range; tests/test_private.py compares the ranges."""
    page = (ROOT / "maxconv/guide/design.md").read_text()
    table = {
        name: ends for name, *ends in re.findall(r"(?m)^\| (\w\S+) \| (\d\S+) \| (\S+) \|$", page)
    }
    oldest, newest = (
        dict(re.findall(r"(?m)^(\S+)==(\S+)$", (ROOT / f"tests/versions/{end}.txt").read_text()))
        for end in ("oldest", "newest")
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [re.split("[<>]", line)[0] for line in project["dependencies"] if ",<" in line]
    assert table == {name: [oldest[name], newest[name]] for name in ranges}


def test_the_first_commands_are_those_that_ci_runs() -> None:
    (commands,) = blocks(PAGES[0], "ci")
    assert [line.split("#")[0].split() for line in commands.splitlines()] == [
        ["pip", "install", ".", "&&", "maxconv", "demo"],
        ["pip", "install", "'.[test]'", "&&", "pytest"],
    ]
    assert [page for page in PAGES[1:] if blocks(page, "ci")] == []


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    """In one directory, in which there is what `maxconv demo` makes."""
    bin = Path(sys.executable).parent
    for commands in ["maxconv demo", *blocks(page)]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", commands],
            env=os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        # Nor did any fail of those that ran in the background.
        assert not re.search("^maxconv: |Traceback", done.stderr, re.MULTILINE), done.stderr
