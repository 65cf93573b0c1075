"""Who may import whom: the order of the rooms is checked, so that it stays true."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "maxconv"
BASICS = {"errors", "text", "private"}

# What each room may import, beside itself and what no room is below: `BASICS`.
MAY_IMPORT = {
    "algebra": set(),
    "config": set(),
    "families": {"algebra"},
    "sources": {"algebra"},
    "models": {"algebra", "families", "sources"},
    "planning": {"algebra", "sources"},
    "execution": {"algebra", "planning", "sources"},
    "processes": {"config"},
    "targets": {"algebra", "execution", "processes", "sources"},
    "jobs": {
        *("algebra", "config", "execution", "models", "planning", "processes"),
        *("sources", "targets"),
    },
    "cli": {
        *("algebra", "config", "execution", "families", "jobs", "planning", "processes"),
        *("sources", "targets"),
    },
    "maxtext": {"config", "jobs"},
    "to_huggingface": {"cli"},
    "to_maxtext": {"cli", "config", "families", "jobs", "sources", "targets"},
}


def imports(file: Path) -> Iterator[str]:
    """The rooms that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module == "maxconv":
            names = [f"maxconv.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "maxconv" and rest and not rest.startswith("__"):
                yield rest.partition(".")[0]


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_imports_what_its_room_may() -> None:
    files = [
        file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or room(file) != "__init__"
    ]
    rooms = {room(file) for file in files} - BASICS
    assert rooms == MAY_IMPORT.keys()
    wrong = {
        f"{file.relative_to(PACKAGE)} imports {other}"
        for file in files
        for other in imports(file)
        if room(file) in MAY_IMPORT
        if other not in {*MAY_IMPORT[room(file)], *BASICS, room(file)}
    }
    assert not wrong


def test_the_rooms_have_few_layers() -> None:
    layer: dict[str, int] = {}
    for name, below in MAY_IMPORT.items():
        assert below <= layer.keys(), f"{name} may import a room that stands above it"
        layer[name] = 1 + max((layer[other] for other in below), default=0)
    assert max(layer.values()) + 1 <= 10  # with the basics


def test_every_room_says_what_lives_there() -> None:
    for name in MAY_IMPORT:
        file = PACKAGE / name / "__init__.py"
        if file.exists():
            assert ast.get_docstring(ast.parse(file.read_text())), name
