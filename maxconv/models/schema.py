"""Validates the JSON files of a checkpoint: a rule for each entry that is read.

The sizes of a model are declared with its family (`families.dims.size`), the other entries here.
Absent and null entries are always valid here.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from typing import Any

from maxconv.families import Dims, stated

_LARGEST = 3.4e38  # finite as a float32, the dtype of scales


@dataclass(frozen=True)
class Rule:
    """`what` an entry must be, as text, and a function that checks a value."""

    what: str
    fits: Callable[[Any], bool]


Schema = Mapping[str, Rule]


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= _LARGEST


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _list_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _object_of(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(fits, value.values()))


def is_block(value: Any) -> bool:
    """Whether a value is the size of a block: rows and columns."""
    return _list_of(lambda n: _is_whole(n, 1, 1 << 20))(value) and len(value) == 2


OBJECT = Rule("an object", lambda value: isinstance(value, dict))
TEXT = Rule("a string", _is_text)
TRUTH = Rule("true or false", lambda value: isinstance(value, bool))
NUMBER = Rule("a finite number", _is_number)
RANK = Rule("a rank", lambda value: _is_whole(value, 1, 1 << 20))

CONFIG: Schema = {
    "architectures": Rule("a list of names", lambda v: _is_text(v) or _list_of(_is_text)(v)),
    "thinker_config": OBJECT,
    "text_config": OBJECT,
    "quantization_config": OBJECT,
    "quantization_config.weight_block_size": Rule("two positive whole numbers", is_block),
}
"""The schema of config.json, without the sizes of its family."""

ADAPTER: Schema = {
    "peft_type": TEXT,
    "r": RANK,
    "lora_alpha": NUMBER,
    "use_rslora": TRUTH,
    "use_dora": TRUTH,
    "fan_in_fan_out": TRUTH,
    "bias": TEXT,
    "rank_pattern": Rule("an object of ranks", _object_of(RANK.fits)),
    "alpha_pattern": Rule("an object of finite numbers", _object_of(_is_number)),
}
"""The schema of adapter_config.json (peft.LoraConfig)."""


def sizes(dims: type[Dims]) -> Schema:
    """The schema of a family's sizes in config.json, and of the objects that contain them."""
    rules: dict[str, Rule] = {}
    for f in fields(dims):
        for key in f.metadata["hf"]:
            *outer, _ = key.split(".")
            rules |= {".".join(outer[: i + 1]): OBJECT for i in range(len(outer))}
            rules[key] = size_rule(f)
    return rules


def size_rule(f: Field) -> Rule:
    """The rule for a field of Dims."""
    if f.type is bool:
        return TRUTH
    if f.type is str:
        return TEXT
    if f.type is list:
        return Rule("a list", _list_of(lambda one: type(one) in (str, int)))
    least, most = f.metadata["least"], f.metadata["most"]
    return Rule(
        f"a whole number from {least} to {most}", lambda value: _is_whole(value, least, most)
    )


def problems(content: Mapping[str, Any], schema: Schema) -> Iterator[str]:
    """A phrase for each invalid entry, such as `hidden_size="42" is not a whole number ...`.

    Args:
        content: of the file. Entries of a `text_config` are found without that prefix.
        schema: for each path, with dots between nested entries.
    """
    for path, rule in schema.items():
        for key, value in stated(content, [path]).items():
            if not rule.fits(value):
                yield f"{key}={json.dumps(value)} is not {rule.what}"


def entry(content: Mapping[str, Any], key: str, default: Any) -> Any:
    """An entry; `default` when it is absent or null."""
    value = content.get(key)
    return default if value is None else value
