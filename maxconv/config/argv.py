"""Splits command-line arguments and converts their values to types; knows no single option."""

import difflib
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

_TRUE = ("y", "yes", "t", "true", "1", "on")
_FALSE = ("n", "no", "f", "false", "0", "off")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)?", re.IGNORECASE)
_YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_YAML = 1 << 20  # characters; MaxText's base.yml has less than a tenth
_LONGEST_SCALAR = 10_000
_DEEPEST_YAML = 20


class Size(int):
    """Bytes, written as transformers takes them: a number, or 5GB, 200MB, 1.5GiB."""

    def __new__(cls, text: str | int) -> "Size":
        match = _SIZE.fullmatch(str(text).strip())
        if match is None:
            raise ValueError(text)
        unit = (match[2] or "B").upper()
        power = "BKMGT".index(unit[0])
        return super().__new__(cls, int(float(match[1]) * (1024 if "I" in unit else 1000) ** power))


_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a YAML list",
    Size: "a size such as 5GB",
}


class Arguments(NamedTuple):
    """A command line, split: the leading `.yml`, the `name=value` pairs, and what is wrong."""

    yml: str | None
    values: dict[str, str]
    problems: list[str]


def split(argv: Sequence[str], flags: Mapping[str, type]) -> Arguments:
    """Splits `argv` into `key=value`, `--flag=value` and `--flag value`, in any order.

    `flags` are the names that may have dashes, with their types. The last of equal names wins.
    """
    yml, values, problems = None, dict[str, str](), list[str]()
    rest = deque(argv)
    while rest:
        argument = rest.popleft()
        name, has_value, text = argument.partition("=")
        if name.startswith("--") and name[2:] not in flags:
            problems.append(_unknown_flag(name, flags))
            if not has_value:
                _skip_value(rest)  # so that its value is not reported as a second problem
        elif name.startswith("--"):
            value = text if has_value else _flag_value(flags[name[2:]], rest)
            if value is None:
                problems.append(f"{name} has no value: write {name}=...")
            else:
                values[name[2:]] = value
        elif has_value and name:
            values[name] = text
        elif _is_yml(argument) and yml is None and values.keys() <= flags.keys():
            yml = argument
        else:
            problems.append(f"{shown(argument)!r} is not of the form key=value or --flag=value")
    return Arguments(yml, values, problems)


def convert(kind: type, value: Any) -> Any:
    """`value`, a string or a value parsed from YAML, as `kind`.

    Raises:
        ValueError: its message says what the value should be.
    """
    try:
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return _checked(value)
        if kind is bool:
            return _boolean(str(value))
        if kind is list:
            return _list(value)
        if isinstance(value, str) or (kind is float and isinstance(value, int)):
            return _checked(kind(value))
        if kind is str and isinstance(value, bool | int | float):
            return str(value)
    except (ValueError, OverflowError, yaml.YAMLError):
        pass
    raise ValueError(_EXPECTED.get(kind, "a string"))


def _checked(value: Any) -> Any:
    """The value; ValueError if it is not finite, or a string with a NUL character."""
    if (isinstance(value, float) and not math.isfinite(value)) or "\0" in str(value):
        raise ValueError
    return value


def own_yaml(text: str) -> Any:
    """Parses one of our own files as YAML 1.1."""
    return yaml.load(text, Loader=_YAML_LOADER)


def load_yaml(text: str) -> Any:
    """Parses untrusted text as YAML 1.1, in which `1e-06` is a string, as it is for MaxText.

    Raises:
        yaml.YAMLError: it is not YAML, is too large or too deeply nested, or has aliases, with
            which a short text can expand without bound.
    """
    try:
        _check_yaml(text)
        return yaml.load(text, Loader=_YAML_LOADER)
    except (ValueError, OverflowError, RecursionError) as error:  # of a date, or a number
        raise yaml.YAMLError(str(error)) from None


def _check_yaml(text: str) -> None:
    if len(text) > MOST_YAML:
        raise yaml.YAMLError(f"it has more than {MOST_YAML} characters")
    depth = 0
    for event in yaml.parse(text, Loader=_YAML_LOADER):
        if isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases (*name); write out what they stand for")
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > _LONGEST_SCALAR:
            raise yaml.YAMLError(f"it has a value of more than {_LONGEST_SCALAR} characters")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST_YAML:
            raise yaml.YAMLError(f"it is nested more than {_DEEPEST_YAML} deep")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean x?` if `known` has a name like `name`, else an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def shown(argument: str) -> str:
    """An argument, for a message; what looks like a Hugging Face token is hidden."""
    return f"{argument[:3]}..." if argument.startswith("hf_") else argument


def _flag_value(kind: type, rest: deque[str]) -> str | None:
    """The value of a flag without `=`: the next argument, or true for a boolean without one."""
    if kind is bool:
        return rest.popleft() if rest and rest[0].lower() in _TRUE + _FALSE else "true"
    return rest.popleft() if rest and not rest[0].startswith("--") else None


def _skip_value(rest: deque[str]) -> None:
    """Takes the next argument if it can only be a value."""
    if rest and "=" not in rest[0] and not rest[0].startswith("--") and not _is_yml(rest[0]):
        rest.popleft()


def _is_yml(argument: str) -> bool:
    return argument.endswith((".yml", ".yaml"))


def _unknown_flag(name: str, flags: Mapping[str, type]) -> str:
    near = did_you_mean(f"--{name[2:].replace('-', '_')}", [f"--{flag}" for flag in flags])
    return f"{name} is not a flag{near or f'; MaxText keys have no dashes: {name[2:]}=...'}"


def _boolean(text: str) -> bool:
    answer = text.strip().lower()
    if answer not in _TRUE + _FALSE:
        raise ValueError
    return answer in _TRUE


def _list(value: Any) -> list[Any]:
    parsed = load_yaml(value) if isinstance(value, str) else value
    if not isinstance(parsed, list):
        raise ValueError
    return parsed
