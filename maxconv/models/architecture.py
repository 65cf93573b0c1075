"""Which family a checkpoint is of: what config.json calls it, or else the user."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from maxconv.errors import UserError
from maxconv.families import BY_ARCHITECTURE, FAMILIES, Family
from maxconv.models import schema
from maxconv.sources import Source

_BASE = "Model"  # how transformers' classes end that have no head, such as LlamaModel


def family_of(source: Source, facts: Mapping[str, Any] | None = None) -> Family:
    """The family of a checkpoint.

    `architectures` of config.json decides, then its `model_type`, then what MaxText says of the
    model_name.

    Raises:
        UserError: it is of none, or config.json holds what it may not.
    """
    check_entries(source, schema.CONFIG)
    for family in _candidates(source.config, facts or {}):
        if family.fits(source.config):
            return family
    what = ", ".join(_architectures(source.config)) or "model without an architecture"
    where = "" if _architectures(source.config) else " in config.json"
    raise UserError(
        f"{source.root} is a {what}{where}, which is not supported; supported architectures are "
        f"{', '.join(BY_ARCHITECTURE)}. To add one, see `maxconv help models`."
    )


def check_entries(source: Source, rules: schema.Schema) -> None:
    """UserError if config.json has invalid values of some entries, or several of one."""
    names = {part for path in rules for part in path.split(".")}
    check_config(
        source,
        (
            *schema.problems(source.config, rules),
            *(f"it has several values of {n}" for n in source.contradictory if n in names),
        ),
    )


def check_config(source: Source, problems: Iterable[str]) -> None:
    """Raises a UserError about config.json if there are problems."""
    if found := list(problems):
        raise UserError(
            [f"config.json in {source.root}: {p}; use that of the original model." for p in found]
        )


def is_base(config: Mapping[str, Any]) -> bool:
    """Whether config.json names a class that has no head, such as LlamaModel."""
    names = _architectures(config)
    return bool(names) and all(
        name.endswith(_BASE) and not name.endswith(f"Head{_BASE}") for name in names
    )


def stated_architecture(config: Mapping[str, Any], family: Family) -> str:
    """The architecture in config.json that made it this family; the family's if there is none."""
    named = _architectures(config)
    own = [name for name in named if name in family.architectures]
    return next(iter([*own, *named]), family.architectures[0])


def notices(config: Mapping[str, Any], family: Family) -> Iterator[str]:
    """How the family was found, if config.json does not name it."""
    if not (names := _architectures(config)):
        kind = schema.entry(config, "model_type", None)
        why = f"model_type={kind}" if kind in family.model_types else "model_name"
        yield f"config.json has no architectures: {why} makes it a {family.architectures[0]}"
    elif is_base(config):
        yield f"{names[0]} is read as a {family.architectures[0]} without a head"


def _candidates(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Iterator[Family]:
    names = _architectures(config)
    for name in names:
        yield from BY_ARCHITECTURE.get(name, ())
    if names and not is_base(config):
        return
    stems = {name.removesuffix(_BASE) for name in names}
    kind = schema.entry(config, "model_type", None)
    for family in FAMILIES:
        if kind in family.model_types or stems & {_stem(name) for name in family.architectures}:
            yield family
    if not names:
        yield from BY_ARCHITECTURE.get(facts.get("architecture", ""), ())


def _stem(architecture: str) -> str:
    """What the classes of a model have in common: Llama of LlamaForCausalLM."""
    return architecture.partition("For")[0]


def _architectures(config: Mapping[str, Any]) -> Sequence[str]:
    named = schema.entry(config, "architectures", [])
    return [named] * bool(named) if isinstance(named, str) else named
