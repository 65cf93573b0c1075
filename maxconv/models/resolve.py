"""Which model a checkpoint is: config.json, MaxText's table and the user's words, together."""

import json
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

from maxconv.algebra import Expr
from maxconv.errors import UserError
from maxconv.families import BY_ARCHITECTURE, Dims, Family, Row, stated_sizes
from maxconv.models.canonical_names import logical_tensors
from maxconv.models.codecs import scale_rows
from maxconv.sources import Source

_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Model:
    """A family at its sizes.

    `published` are the sizes that the checkpoint has; `dims` those that MaxText is to have: its
    vocabulary may be padded or cut, its layers may be fewer. `rows` is the family's table at these.
    `tensors` are the checkpoint's, by the names of that table. `notices` says where they differ.
    `rounds`: tensors are rounded to what is saved before anything is computed. `metadata` is what
    MaxText wants to know beside the tree.
    """

    family: Family
    dims: Dims
    published: Dims
    rows: tuple[Row, ...]
    tensors: Mapping[str, Expr]
    notices: tuple[str, ...]
    rounds: bool = True
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor is left out on purpose: ignored, tied, or of a layer not wanted.

        `name` is that of the family's table.
        """
        if self.family.leaves_out(name, self.dims) or (self.dims.tied and name == "lm_head.weight"):
            return True
        number = name.removeprefix("model.layers.").partition(".")[0]
        return number.isdigit() and any(
            first <= int(number) < end
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
) -> Model:
    """The model of a checkpoint.

    Args:
        source: where config.json and the tensor names come from.
        name: MaxText's model_name, or None to take everything from config.json.
        facts: MaxText's own configuration of that model.
        words: what the user typed, which overrides both.
        keep_fp8: fp8 weights are kept, and scales beside them.

    Raises:
        UserError: an architecture that is not known, or every difference between config.json and
            what MaxText would build, at once.
    """
    family = _family(source)
    logical = logical_tensors(source, family, keep_fp8)
    published = _published(source, family, logical.tensors)
    # Layers of multi-token prediction are there if they are asked for.
    words, facts = dict(words or {}), {"mtp_num_layers": 0, **(facts or {})}
    problems = _architecture_problems(family, name, facts)
    chosen: dict[str, Any] = {}
    wanted = facts | words
    for f in fields(published):
        if not wanted.get(_encoder(f), True):
            continue
        key, theirs = f.metadata["maxtext"], getattr(published, f.name)
        typed = key in words
        said = words[key] if typed else facts.get(key)
        if said is None:
            continue
        n = unit(f.name, family)
        ours = chosen[f.name] = said * n if n > 1 else said
        if ours != theirs and not _may_differ(f, ours, theirs, family, typed):
            fits = theirs // n if n > 1 else theirs
            mend = f"{key}={fits}" if typed else f"override_model_config=True {key}={fits}"
            problems.append(
                f"{key}={said}{'' if typed else f' of {name}'} contradicts "
                f"{_entry(source, f)}={theirs} in config.json; "
                f"if the checkpoint is right, say {mend}."
            )
    dims = replace(published, **chosen)
    predicts = any(f.name == "mtp" and f.metadata["hf"] for f in fields(published))
    for key, wants, has in (
        ("use_multimodal", dims.multimodal, family.encoders),
        ("use_audio", dims.audio, family.hearing),
        ("mtp_num_layers", dims.mtp, predicts),
    ):
        if wants and not has:
            problems.append(
                f"{key}={wants}, but MaxText has no such part of {family.architectures[0]}: "
                "take it out."
            )
    if dims.mtp and dims.layers < published.layers:
        problems.append(
            f"mtp_num_layers={dims.mtp} needs all {published.layers} layers before: "
            "take base_num_decoder_layers out."
        )
    if problems:
        raise UserError(problems)
    notices = [*logical.notices, *_notices(dims, published), *_advice(family, name, facts)]
    scales = scale_rows(family, dims, source.config, logical.tensors)
    rows = (*family.rows(dims), *scales)
    return Model(family, dims, published, rows, logical.tensors, tuple(notices))


def _family(source: Source) -> Family:
    entry = source.config.get("architectures") or []
    named = [entry] if isinstance(entry, str) else [str(name) for name in entry]
    for architecture in named:
        for family in BY_ARCHITECTURE.get(architecture, ()):
            if family.fits(source.config):
                return family
    what = ", ".join(named) or "model without an architecture in config.json"
    raise UserError(
        f"{source.root} is a {what}; maxconv knows {', '.join(BY_ARCHITECTURE)}. "
        'To teach it another, see "Add a model" in its README.'
    )


def _published(source: Source, family: Family, tensors: Mapping[str, Expr]) -> Dims:
    """The sizes in config.json; UserError when they are none, or not those of the embedding."""
    problems = [
        f"{key}={json.dumps(value)} is not {'true or false' if f.type is bool else 'a size'}"
        for f in fields(family.sizes)
        for key, value in stated_sizes(source.config, f).items()
        if not _is_sane(value, f)
    ]
    if not problems:
        try:
            dims = family.dims(source.config, tensors)
            shape = tensors[_EMBEDDING].shape if _EMBEDDING in tensors else None
            if shape in (None, (dims.vocab, dims.emb)):
                return dims
            problems = [
                f"vocab_size={dims.vocab} and hidden_size={dims.emb}, but {_EMBEDDING} is {shape}"
            ]
        except KeyError as error:
            problems = [f"there is no entry {error}"]
    raise UserError(
        [f"config.json in {source.root}: {p}; take that of the original model." for p in problems]
    )


def _is_sane(value: Any, f: Field) -> bool:
    return type(value) is f.type and (f.type is not int or value >= f.metadata["least"])


def _entry(source: Source, f: Field) -> str:
    """The entry of config.json that states a field, or would."""
    return next(iter(stated_sizes(source.config, f)), f.metadata["hf"][0])


def _architecture_problems(family: Family, name: str | None, facts: Mapping[str, Any]) -> list[str]:
    architecture = facts.get("architecture", family.architectures[0])
    if architecture in family.architectures:
        return []
    return [
        f"model_name={name} is a {architecture}, but config.json says {family.architectures[0]}; "
        "name the model it is."
    ]


def _encoder(f: Field) -> str:
    """MaxText's key of the encoder that a size is of: config.json has it in an entry of its own."""
    entry = next(iter(f.metadata["hf"]), "").partition(".")[0]
    return {"vision_config": "use_multimodal", "audio_config": "use_audio"}.get(entry, "")


def unit(name: str, family: Family) -> int:
    """How many of HF's one of MaxText's is."""
    return family.layers_per_block if name == "layers" else 1


def _may_differ(f: Field, ours: Any, theirs: Any, family: Family, typed: bool) -> bool:
    if not f.metadata["hf"]:  # config.json has nothing to say
        return True
    match f.name:
        case "vocab":  # MaxText's own tables pad some families; the user may pad any
            return family.pads_vocab or (typed and ours > theirs)
        case "layers":  # the first N, as people test
            return typed and 0 < ours < theirs
        case "mtp":
            return ours < theirs
        case _:
            return False


def _notices(dims: Dims, published: Dims):
    if dims.vocab > published.vocab:
        yield f"vocabulary padded with zeros from {published.vocab} to {dims.vocab} rows"
    if dims.vocab < published.vocab:
        yield f"vocabulary cut from {published.vocab} to {dims.vocab} rows, as MaxText does"
    if dims.layers < published.layers:
        yield f"only the first {dims.layers} of {published.layers} layers"
    if dims.mtp < published.mtp:
        yield (
            f"the layers of multi-token prediction are left out: mtp_num_layers={published.mtp} "
            "would take them, too"
        )


def _advice(family: Family, name: str | None, facts: Mapping[str, Any]):
    if name is None and family.train_with:
        yield f"train it with {family.train_with}, or under a model_name of this family"
    if train_as := facts.get("train_as"):
        yield f"train it with model_name={train_as}: only MaxText's converter knows {name}"
