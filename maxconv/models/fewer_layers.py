"""The config.json of a model that has fewer layers than the published one."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from maxconv.families.dims import PER_LAYER
from maxconv.models.resolve import Model


def shorten(config: dict[str, Any], model: Model) -> Iterator[str]:
    """Changes what a config.json says of layers, in place; yields a sentence for each entry.

    Changed are the number of layers, and the entries with something for each of them.
    """
    count, was = model.dims.layers, model.published.layers
    entries = {e for f in fields(model.dims) if f.name == "layers" for e in f.metadata["hf"]}
    for level in _of_decoder(config) if count < was else ():
        for key, value in level.items():
            if key in entries and value == was:
                level[key] = count
                yield f"config.json: {key} is {count} instead of {was}"
            elif _is_one_each(key, value, was):
                level[key] = value[:count]
                yield f"config.json: {key} is that of the first {count} layers"
            elif key == PER_LAYER and isinstance(value, dict):
                level[key] = {k: v for k, v in value.items() if not _is_beyond(k, count)}


def _of_decoder(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The levels of a config.json that have entries of the decoder, see `text_entries`."""
    yield config
    level = config
    for nested in ("thinker_config", "text_config"):
        if isinstance(inner := level.get(nested), dict):
            level = inner
            yield level


def _is_one_each(key: str, value: Any, layers: int) -> bool:
    """Whether an entry is a list with something for each layer; some list as many tokens."""
    return isinstance(value, list) and len(value) == layers and not key.endswith("token_id")


def _is_beyond(key: str, layers: int) -> bool:
    return key.isdecimal() and int(key) >= layers
