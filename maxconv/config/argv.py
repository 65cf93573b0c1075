"""The words of a command line, split and turned into typed values; no word has a meaning here."""

import difflib
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

_TRUE = ("y", "yes", "t", "true", "1", "on")
_FALSE = ("n", "no", "f", "false", "0", "off")
_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", list: "a YAML list"}
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Words(NamedTuple):
    """A command line, split: the leading `.yml`, the `name=value` words, and what was wrong."""

    yml: str | None
    values: dict[str, str]
    problems: list[str]


def split(argv: Sequence[str], flags: Mapping[str, type]) -> Words:
    """Splits `argv` into `key=value`, `--flag=value` and `--flag value`, in any order.

    `flags` are the names that may have dashes, with their types. The last of equal names wins.
    """
    yml, values, problems = None, dict[str, str](), list[str]()
    rest = deque(argv)
    while rest:
        word = rest.popleft()
        name, has_value, text = word.partition("=")
        if name.startswith("--") and name[2:] not in flags:
            problems.append(_unknown_flag(name, flags))
            if not has_value:
                _skip_value(rest)  # its value is no second problem
        elif name.startswith("--"):
            value = text if has_value else _flag_value(flags[name[2:]], rest)
            if value is None:
                problems.append(f"{name} has no value: write {name}=...")
            else:
                values[name[2:]] = value
        elif has_value and name:
            values[name] = text
        elif _is_yml(word) and yml is None and values.keys() <= flags.keys():
            yml = word
        else:
            problems.append(f"{shown(word)!r} is not of the form key=value or --flag=value")
    return Words(yml, values, problems)


def convert(kind: type, value: Any) -> Any:
    """`value`, a text or what YAML made of one, as `kind`.

    Raises a ValueError that names what it should be.
    """
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if kind is bool:
            return _boolean(str(value))
        if kind is list:
            return _list(value)
        if isinstance(value, str) or (kind is float and isinstance(value, int)):
            return kind(value)
        if kind is str and not isinstance(value, list | dict):
            return str(value)
    except (ValueError, yaml.YAMLError):
        pass
    raise ValueError(_EXPECTED.get(kind, "a text"))


def load_yaml(text: str) -> Any:
    """`text` as YAML 1.1, in which `1e-06` is a text, as it is for MaxText."""
    return yaml.load(text, Loader=_YAML_LOADER)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`: did you mean x?` if `known` has a name like `name`, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f": did you mean {near[0]}?" if near else ""


def shown(word: str) -> str:
    """`word` for a message: a stray one may be a token of the Hugging Face Hub."""
    return f"{word[:3]}..." if word.startswith("hf_") else word


def _flag_value(kind: type, rest: deque[str]) -> str | None:
    """The value of a flag without `=`: the next word, or true for a boolean that has none."""
    if kind is bool:
        return rest.popleft() if rest and rest[0].lower() in _TRUE + _FALSE else "true"
    return rest.popleft() if rest and not rest[0].startswith("--") else None


def _skip_value(rest: deque[str]) -> None:
    """Takes the next word if it can only be a value."""
    if rest and "=" not in rest[0] and not rest[0].startswith("--") and not _is_yml(rest[0]):
        rest.popleft()


def _is_yml(word: str) -> bool:
    return word.endswith((".yml", ".yaml"))


def _unknown_flag(name: str, flags: Mapping[str, type]) -> str:
    near = did_you_mean(f"--{name[2:].replace('-', '_')}", [f"--{flag}" for flag in flags])
    return f"{name} is not a flag{near or f': a key of MaxText has no dashes, {name[2:]}=...'}"


def _boolean(text: str) -> bool:
    word = text.strip().lower()
    if word not in _TRUE + _FALSE:
        raise ValueError
    return word in _TRUE


def _list(value: Any) -> list[Any]:
    parsed = load_yaml(value) if isinstance(value, str) else value
    if not isinstance(parsed, list):
        raise ValueError
    return parsed
