"""Identifies the model of a checkpoint from config.json, MaxText's configuration and arguments."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from maxconv.algebra import Expr
from maxconv.errors import UserError
from maxconv.families import Dims, Family, Row, matters, number_after, stated_sizes
from maxconv.families.dims import DECODER_LAYERS, PER_LAYER
from maxconv.models import schema
from maxconv.models.architecture import (
    check_config,
    check_entries,
    family_of,
    stated_architecture,
)
from maxconv.models.architecture import notices as found_as
from maxconv.models.canonical_names import logical_tensors
from maxconv.models.codecs import scale_rows
from maxconv.models.head import Head, head, head_problems
from maxconv.models.lora import left_out
from maxconv.models.stored_names import HEAD
from maxconv.models.unlike import dense_layers
from maxconv.sources import Source
from maxconv.text import argument

_MOST_PADDING = 2  # times the vocabulary; more is a mistake


@dataclass(frozen=True)
class Model:
    """A family with concrete sizes.

    Attributes:
        dims: the sizes in MaxText: its vocabulary may be padded or cut, its layers may be fewer.
        published: the sizes of the checkpoint.
        rows: the family's table for `dims`.
        tensors: those of the checkpoint, by canonical name.
        notices: sentences about how `dims` and `published` differ, and other choices.
        rounds: whether tensors are rounded to the saved dtype before anything is computed.
        metadata: what MaxText reads in addition to the tree.
        architecture: as config.json has it.
    """

    family: Family
    dims: Dims
    published: Dims
    rows: tuple[Row, ...]
    tensors: Mapping[str, Expr]
    notices: tuple[str, ...]
    rounds: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ""

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor is left out on purpose: ignored, tied, or of a layer that is not wanted.

        `name` is its canonical name.
        """
        if self.family.leaves_out(name, self.dims) or (self.dims.tied and name == HEAD):
            return True
        number = number_after(name, DECODER_LAYERS)
        return number is not None and any(
            first <= number < end
            for first, end in (
                (self.dims.layers, self.published.layers),
                (self.published.layers + self.dims.mtp, self.published.layers + self.published.mtp),
            )
        )


def resolve(
    source: Source,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    words: Mapping[str, Any] | None = None,
    keep_fp8: bool = False,
    head_differs: bool = False,
) -> Model:
    """The model of a checkpoint.

    Args:
        source: the checkpoint, with its config.json.
        name: MaxText's model_name, or None to take everything from config.json.
        facts: MaxText's configuration of that model.
        words: sizes given as arguments, which override both.
        keep_fp8: keep fp8 weights, and their scales as separate parameters.
        head_differs: whether a head that is stored beside a tied table has other values.

    Raises:
        UserError: the architecture is not supported; or with every difference between config.json
            and what MaxText would build.
    """
    family = family_of(source, facts)
    check_entries(source, schema.sizes(family.sizes))
    logical = logical_tensors(source, family, keep_fp8)
    ends = head(source, family, logical.tensors, head_differs)
    published = _published(source, family, ends)
    dims = _dims(source, family, published, name, facts or {}, words or {})
    if problems := list(layer_problems(dims, ends.tensors)):
        raise UserError(problems)
    table = tuple(family.rows(dims))
    if problems := list(dense_layers(source.config, family, dims, table, ends.tensors)):
        raise UserError(problems)
    rows = (*table, *scale_rows(family, dims, source.config, ends.tensors))
    notices = [
        *found_as(source.config, family),
        *logical.notices,
        *ends.notices,
        *left_out(source, family, dims, ends.tensors),
        *_beside(family, ends.tensors),
        *_notices(dims, published),
    ]
    architecture = stated_architecture(source.config, family)
    tensors, said = ends.tensors, tuple(notices)
    return Model(family, dims, published, rows, tensors, said, architecture=architecture)


def _dims(
    source: Source,
    family: Family,
    published: Dims,
    name: str | None,
    facts: Mapping[str, Any],
    words: Mapping[str, Any],
) -> Dims:
    """The sizes in MaxText; UserError with every one that is not possible."""
    # Layers for multi-token prediction are converted only if they are asked for.
    facts = {"mtp_num_layers": 0, **facts}
    chosen, contradictions = _chosen(source, family, published, name, facts, words)
    dims = replace(published, **chosen)
    problems = _architecture_problems(source, family, name, facts)
    if problems := [*problems, *contradictions, *_part_problems(family, dims, published)]:
        raise UserError(problems)
    return dims


def _chosen(
    source: Source,
    family: Family,
    published: Dims,
    name: str | None,
    facts: Mapping[str, Any],
    words: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """The sizes from MaxText or the arguments, and a sentence for each that is not possible."""
    chosen: dict[str, Any] = {}
    contradictions: list[str] = []
    fitting: dict[str, Any] = {}
    wanted = {**facts, **words}
    for f in fields(published):
        key, theirs, n = f.metadata["maxtext"], getattr(published, f.name), unit(f.name, family)
        typed = key in words
        said = words[key] if typed else facts.get(key)
        if said is None or not wanted.get(f"use_{encoder_of(f)}", True):
            continue
        if not matters(f, published):
            continue
        ours = chosen[f.name] = said * n if n > 1 else said
        if ours != theirs and not _may_differ(f, ours, theirs, family, typed):
            fitting[key] = theirs // n if n > 1 else theirs
            contradictions.append(
                f"{key}={said}{'' if typed else f' of {name}'} contradicts "
                f"{_origin(source, f, theirs)}"
            )
    if not contradictions:
        return chosen, []
    override = "" if fitting.keys() <= words.keys() else "override_model_config=True "
    mend = override + " ".join(argument(key, value) for key, value in fitting.items())
    leave = "" if name is None else "leave out model_name, or "
    return chosen, [f"{', '.join(contradictions)}; if the checkpoint is right, {leave}add {mend}"]


def _part_problems(family: Family, dims: Dims, published: Dims) -> Iterator[str]:
    """Parts that were asked for but that MaxText does not have, or only with all layers."""
    for key, wants, has in (
        ("use_multimodal", dims.multimodal, family.encoders),
        ("use_audio", dims.audio, family.audio_patterns),
        ("mtp_num_layers", dims.mtp, family.predicts),
    ):
        if wants and not has:
            yield (
                f"{key}={wants}, but MaxText's {family.architectures[0]} has no such part; "
                "remove it."
            )
    if dims.mtp and dims.layers < published.layers:
        yield (
            f"mtp_num_layers={dims.mtp} needs all {published.layers} decoder layers; remove "
            "base_num_decoder_layers."
        )


def _published(source: Source, family: Family, ends: Head) -> Dims:
    """The sizes in config.json; UserError if the tensors have different ones."""
    try:
        dims = replace(family.dims(source.config), tied=ends.tied)
        dims = replace(dims, mtp=_predicting(family, dims.layers, ends.tensors))
    except KeyError as error:
        check_config(source, [f"there is no entry {error}"])
        raise
    check_config(source, _size_problems(source, dims, ends.tensors))
    return dims


def _predicting(family: Family, layers: int, names: Iterable[str]) -> int:
    """The number of layers for multi-token prediction that a checkpoint has, by their names:
    config.json may have lost the entry, or the checkpoint the layers."""
    if not family.predicts:
        return 0
    numbers = {number_after(n, DECODER_LAYERS) for n in names if n.endswith(family.predicts)}
    return sum(number is not None and number >= layers for number in numbers)


def _size_problems(source: Source, dims: Dims, tensors: Mapping[str, Expr]) -> Iterator[str]:
    """Inconsistent sizes: invalid defaults, lists of a wrong length, another embedding shape."""
    for f in fields(dims):
        value, rule = getattr(dims, f.name), schema.size_rule(f)
        if callable(f.metadata["default"]) and not rule.fits(value):
            yield f"{_entry(source, f)} is absent and would be {value}, not {rule.what}"
        if (count := f.metadata["each"]) and len(value) != getattr(dims, count):
            yield f"{_entry(source, f)} has {len(value)} entries for {getattr(dims, count)} {count}"
        if (larger := f.metadata["below"]) and value >= getattr(dims, larger):
            yield f"{_entry(source, f)}={value}, but there are {getattr(dims, larger)} {larger}"
    yield from head_problems(dims, tensors)


def layer_problems(dims: Dims, names: Iterable[str]) -> Iterator[str]:
    """Layer counts that exceed the layers in the checkpoint, checked before rows are made.

    Those of encoders only if they are wanted.
    """
    wanted: dict[str, int] = {}
    for f in fields(dims):
        prefix, value, encoder = f.metadata["numbered"], getattr(dims, f.name), encoder_of(f)
        if prefix and (not encoder or getattr(dims, encoder)):
            wanted[prefix] = wanted.get(prefix, 0) + (len(value) if f.type is list else value)
    found = {prefix: set[int]() for prefix in wanted}
    for name in names:
        for prefix, numbers in found.items():
            if (number := number_after(name, prefix)) is not None:
                numbers.add(number)
    for prefix, count in wanted.items():
        if count > len(found[prefix]):
            yield (
                f"config.json and the arguments ask for {count} layers {prefix}*, but the "
                f"checkpoint has tensors of {len(found[prefix])}; download it again."
            )


def _entry(source: Source, f: Field) -> str:
    """The entry of config.json that a field is read from, or would be."""
    usual = (key for key in f.metadata["hf"] if not key.startswith(PER_LAYER))
    return next(iter((*stated_sizes(source.config, f), *usual)), f.name)


def _origin(source: Source, f: Field, value: Any) -> str:
    """A size of the checkpoint, and what says so: config.json only if it does."""
    said = f"{_entry(source, f)}={value}"
    entries = list(stated_sizes(source.config, f).values())
    if entries and entries[0] == value:
        return f"{said} in config.json"
    if f.name in ("tied", "mtp"):
        return f"{said}, as the tensors of the checkpoint have it"
    return f"{said}, which is the default where config.json has no such entry"


def _architecture_problems(
    source: Source, family: Family, name: str | None, facts: Mapping[str, Any]
) -> list[str]:
    architecture = facts.get("architecture", family.architectures[0])
    if architecture in family.architectures:
        return []
    return [
        f"model_name={name} is a {architecture}, but config.json says "
        f"{stated_architecture(source.config, family)}; correct model_name, or leave it out."
    ]


def encoder_of(f: Field) -> str:
    """The encoder that a size belongs to, "multimodal" or "audio", by its entry in config.json."""
    entry = next(iter(f.metadata["hf"]), "").partition(".")[0]
    return {"vision_config": "multimodal", "audio_config": "audio"}.get(entry, "")


def unit(name: str, family: Family) -> int:
    """How many HF layers one unit of a size is in MaxText; 1 for other sizes."""
    return family.layers_per_block if name == "layers" else 1


def _may_differ(f: Field, ours: Any, theirs: Any, family: Family, typed: bool) -> bool:
    if not f.metadata["hf"]:  # config.json has nothing to say
        return True
    match f.name:
        case "vocab":  # MaxText's own tables pad some families; the user may pad any
            may_pad = family.pads_vocab or typed
            may_cut = family.pads_vocab and (typed or theirs - ours <= family.spare_rows)
            return (may_pad if ours > theirs else may_cut) and ours <= _MOST_PADDING * theirs
        case "layers":  # the first N, for tests
            return typed and 0 < ours < theirs
        case "mtp":
            return ours < theirs
        case _:
            return False


def _beside(family: Family, names: Iterable[str]) -> Iterator[str]:
    """A sentence about parts of the model that MaxText does not have, beside its layers."""
    parts = Counter(
        name.removeprefix("model.").partition(".")[0]
        for name in names
        if number_after(name, DECODER_LAYERS) is None
        and any(fnmatchcase(name, pattern) for pattern in family.ignored)
    )
    if parts:
        found = ", ".join(f"{count} tensors of {part}" for part, count in parts.items())
        yield f"left out, as MaxText's {family.architectures[0]} has no such part: {found}"


def _notices(dims: Dims, published: Dims):
    if dims.vocab > published.vocab:
        yield f"the vocabulary is padded with zeros from {published.vocab} to {dims.vocab} rows"
    if dims.vocab < published.vocab:
        yield f"the vocabulary is cut from {published.vocab} to {dims.vocab} rows, as MaxText does"
    if dims.layers < published.layers:
        yield f"only the first {dims.layers} of {published.layers} layers are converted"
    if dims.mtp < published.mtp:
        yield (
            "the layers for multi-token prediction are left out; to include them, add "
            f"mtp_num_layers={published.mtp}"
        )
