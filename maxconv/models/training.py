"""The arguments with which MaxText computes what transformers computes with a checkpoint.

MaxText's models differ in more than sizes, so the one that is nearest is named, and the arguments
in which the checkpoint differs from it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

from maxconv.families import Family, matters, text_entries
from maxconv.families.rope import FULL, SLIDING, Rope, difference, halves, latent, maxtext_rope
from maxconv.models.codecs import SCALE
from maxconv.models.resolve import Model, encoder_of, unit

NAMELESS = "default"  # MaxText's model_name if none is given
_SAME = 1e-6  # relative, of frequencies
_KINDS = {bool: bool, int: int | float, float: int | float, str: str, list: list}


@dataclass(frozen=True)
class Training:
    """How a checkpoint is trained: arguments of MaxText, and sentences on what differs anyhow."""

    arguments: Mapping[str, Any]
    notices: tuple[str, ...]


@dataclass(frozen=True)
class _Base:
    """One of MaxText's models as what is to be trained: what is told it, and what it can't do."""

    name: str
    told: Mapping[str, Any]
    problems: tuple[str, ...]
    rope_off: float


def training(
    model: Model,
    config: Mapping[str, Any],
    known: Mapping[str, Mapping[str, Any]],
    given: str | None,
    layout: Mapping[str, Any],
) -> Training:
    """The arguments that training needs, without those of the run.

    Args:
        model: what was converted.
        config: its config.json.
        known: the values of MaxText's arguments for each model_name; `NAMELESS` for none.
        given: the model_name that the user gave.
        layout: how the checkpoint is laid out, as arguments.
    """
    family, text = model.family, text_entries(config)
    computed, problems = _computed(model, text)
    wanted = {**_sizes(model), **layout, **computed}
    bases = [
        _base(model, text, name, known[name], wanted) for name in _candidates(family, known, given)
    ]
    best = min(bases, key=lambda b: (*_badness(b, family, given), len(b.told), b.name))
    named = {} if best.name == NAMELESS else {"model_name": best.name}
    override = {"override_model_config": True} if named and best.told else {}
    notices = [*problems, *best.problems]
    if given == best.name and (other := {k: v for k, v in best.told.items() if k in computed}):
        notices.insert(
            0,
            f"config.json differs from model_name={given} in what is no size: to train, pass "
            f"MaxText override_model_config=True {' '.join(f'{k}={v}' for k, v in other.items())}",
        )
    block = {} if named else {"decoder_block": family.decoder_block}
    arguments = {**named, **override, **block, **best.told, "scan_layers": layout["scan_layers"]}
    return Training(arguments, tuple(notices))


def _badness(base: _Base, family: Family, given: str | None) -> tuple[Any, ...]:
    """How far a base is from what is wanted. Where no name is needed, none that does not fit."""
    misnamed = base.name not in (given, NAMELESS) and not family.computes.names and base.told
    return len(base.problems), base.rope_off, base.name != given, bool(misnamed)


def _candidates(
    family: Family, known: Mapping[str, Mapping[str, Any]], given: str | None
) -> list[str]:
    """The model_names with which MaxText might compute it."""
    nameless = [] if family.computes.names else [NAMELESS]
    if given is not None:
        return [known[given].get("train_as", given), *nameless]
    alike = [
        name
        for name, facts in known.items()
        if facts.get("architecture") in family.architectures
        and facts["decoder_block"] == family.decoder_block
        and "train_as" not in facts
    ]
    return alike + nameless


def _sizes(model: Model) -> dict[str, Any]:
    """The arguments for the sizes of the model."""
    dims = model.dims
    found: dict[str, Any] = {"decoder_block": model.family.decoder_block}
    for f in fields(dims):
        part = encoder_of(f)
        if not matters(f, dims):
            continue
        if (key := f.metadata["maxtext"]) and (not part or getattr(dims, part)):
            value, n = getattr(dims, f.name), unit(f.name, model.family)
            found[key] = value // n if n > 1 else value
    if dims.experts > 1 and dims.moe_mlp > 0:
        found["base_moe_mlp_dim"] = dims.moe_mlp
    if dims.tied:
        found["normalize_embedding_logits"] = model.family.computes.scaled_table
    keeps_fp8 = any(name.endswith(SCALE) for name in model.tensors)
    return found | {"weight_dtype": "float8_e4m3fn" if keeps_fp8 else "float32"}


def _computed(model: Model, text: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments for what is no size, and a sentence for each that MaxText does not have."""
    found, problems = dict[str, Any](), list[str]()
    computes, name = model.family.computes, model.family.architectures[0]
    for setting in computes.settings:
        entry, value = setting.stated(text)
        try:
            said = setting.convert(value)
        except (KeyError, TypeError):
            problems.append(f"{entry}={value!r} of config.json is not in MaxText's {name}")
            continue
        if said is not None:
            found[setting.argument] = said
    if computes.rope is not None:
        try:
            arguments = halves if computes.in_halves(model.dims) else computes.rope
            found |= arguments(*computes.ropes(text), computes.turned(model.dims, FULL))
        except (ValueError, ArithmeticError, TypeError) as error:
            problems.append(f"the RoPE of config.json is not understood: {error}")
    return found, problems


def _base(
    model: Model,
    text: Mapping[str, Any],
    name: str,
    facts: Mapping[str, Any],
    wanted: Mapping[str, Any],
) -> _Base:
    told = {key: value for key, value in wanted.items() if value != facts.get(key)}
    problems = [
        f"{key}={value!r} is of another type than MaxText's"
        for key, value in told.items()
        if key in facts and not _is_alike(value, facts[key])
    ]
    told = {
        key: value
        for key, value in told.items()
        if key not in facts or _is_alike(value, facts[key])
    }
    problems += _fixed_problems(model, text, name)
    off, sentences = _rope_problems(model, text, {**facts, **told})
    return _Base(name, told, (*problems, *sentences), off)


def _is_alike(value: Any, fact: Any) -> bool:
    """Whether a value of config.json may be MaxText's, by its type."""
    if isinstance(value, bool) != isinstance(fact, bool):
        return False
    return isinstance(value, _KINDS.get(type(fact), object))


def _fixed_problems(model: Model, text: Mapping[str, Any], name: str) -> Iterator[str]:
    """A sentence for each entry of which MaxText computes another value."""
    architecture = model.family.architectures[0]
    for fixed in model.family.computes.fixed:
        entry, value = fixed.stated(text)
        computed = fixed.computed(model.dims, name)
        if isinstance(value, list) and isinstance(computed, list):
            value = value[: len(computed)]
        if value is None or value == computed or not (value or computed):
            continue
        if fixed.up_to:
            yield (
                f"MaxText's {architecture} has no sliding window, config.json has "
                f"{entry}={value}: both compute the same for sequences of up to that many tokens"
            )
        elif isinstance(value, list):
            yield f"MaxText's {architecture} has not the {entry} of config.json: logits will differ"
        else:
            yield (
                f"MaxText's {architecture} computes with {entry}={computed}, config.json has "
                f"{value}: logits will differ"
            )


def _rope_problems(
    model: Model, text: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[float, list[str]]:
    """By how much frequencies differ from MaxText's with these arguments, and sentences on it."""
    computes = model.family.computes
    if computes.rope is None:
        return 0.0, []
    worst, problems = 0.0, []
    try:
        full, sliding = computes.ropes(text)
        kinds = [(FULL, full), *([(SLIDING, sliding)] if computes.has_sliding else [])]
        for attention, rope in kinds:
            dims = computes.turned(model.dims, attention)
            theirs = maxtext_rope(values, attention)
            count, off = difference(rope, theirs, dims)
            worst = max(worst, off if off > _SAME else 0.0)
            if off > _SAME:
                problems.append(_rope_sentence(rope, attention, count, dims // 2, off))
            elif computes.rope is not latent and not math.isclose(rope.amplitude, theirs.amplitude):
                problems.append(f"MaxText has not the attention_factor of {_named(rope)}")
    except (ValueError, ArithmeticError, TypeError):
        pass  # said where arguments are made of it
    return worst, problems


def _rope_sentence(rope: Rope, attention: str, count: int, pairs: int, off: float) -> str:
    much = f" by up to {off:.0%}" if math.isfinite(off) else ""
    return (
        f"MaxText has no RoPE like that of {attention.replace('_', ' ')} in config.json "
        f"({_named(rope)}): with the arguments for training, {count} of {pairs} frequencies "
        f"differ{much}, and so do logits"
    )


def _named(rope: Rope) -> str:
    factor = rope.entries.get("factor")
    return f"rope_type={rope.kind}, rope_theta={rope.base}" + (
        f", factor={factor}" if factor else ""
    )
