"""Which model a checkpoint is: config.json, MaxText's table and the user's words, together."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from maxconv.errors import UserError
from maxconv.families import BY_ARCHITECTURE, Dims, Family
from maxconv.sources import Source

# MaxText's key of each field of Dims.
_KEYS = {
    "emb": "base_emb_dim",
    "mlp": "base_mlp_dim",
    "heads": "base_num_query_heads",
    "kv_heads": "base_num_kv_heads",
    "head_dim": "head_dim",
    "layers": "base_num_decoder_layers",
    "vocab": "vocab_size",
    "tied": "logits_via_embedding",
    "experts": "num_experts",
    "moe_mlp": "base_moe_mlp_dim",
}
_EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Model:
    """A family at its sizes.

    `published` are the sizes that the checkpoint has; `dims` those that MaxText is to have: its
    vocabulary may be padded or cut, its layers may be fewer. `notices` says where they differ.
    """

    family: Family
    dims: Dims
    published: Dims
    notices: tuple[str, ...]

    def is_dropped(self, name: str) -> bool:
        """Whether a tensor is left out on purpose: ignored, tied, or of a layer past the last."""
        if self.family.ignores(name) or (self.dims.tied and name == "lm_head.weight"):
            return True
        number = name.partition(".layers.")[2].partition(".")[0]
        return number.isdigit() and self.dims.layers <= int(number) < self.published.layers


def resolve(
    source: Source,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    words: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a checkpoint.

    Args:
        source: where config.json and the tensor names come from.
        name: MaxText's model_name, or None to take everything from config.json.
        facts: MaxText's own configuration of that model.
        words: what the user typed, which overrides both.

    Raises:
        UserError: an architecture that is not known, or every difference between config.json and
            what MaxText would build, at once.
    """
    family = _family(source)
    published = _published(source, family)
    words, facts = words or {}, facts or {}
    problems = _block_problems(family, name, facts)
    chosen: dict[str, Any] = {}
    for field, key in _KEYS.items():
        theirs, typed = getattr(published, field), key in words
        said = words[key] if typed else facts.get(key)
        ours = theirs if said is None else said * _unit(field, family)
        chosen[field] = ours
        if ours != theirs and not _may_differ(field, ours, theirs, family, typed):
            fits = theirs // _unit(field, family)
            mend = f"{key}={fits}" if typed else f"override_model_config=True {key}={fits}"
            problems.append(
                f"{key}={said}{'' if typed else f' of {name}'} contradicts "
                f"{family.hf_keys()[field][0]}={theirs} in config.json; "
                f"if the checkpoint is right, say {mend}."
            )
    if problems:
        raise UserError(problems)
    dims = replace(published, **chosen)
    notices = [*_notices(dims, published), *_advice(family, name)]
    return Model(family, dims, published, tuple(notices))


def _family(source: Source) -> Family:
    entry = source.config.get("architectures") or []
    named = [entry] if isinstance(entry, str) else [str(name) for name in entry]
    for architecture in named:
        if architecture in BY_ARCHITECTURE:
            return BY_ARCHITECTURE[architecture]
    what = ", ".join(named) or "model without an architecture in config.json"
    raise UserError(f"{source.root} is a {what}; maxconv knows {', '.join(BY_ARCHITECTURE)}.")


def _published(source: Source, family: Family) -> Dims:
    """The sizes in config.json; UserError when they are none, or not those of the embedding."""
    config = {key: value for key, value in source.config.items() if value is not None}
    problems = [
        f"{key}={json.dumps(config[key])} is not {'true or false' if field == 'tied' else 'a size'}"
        for field, keys in family.hf_keys().items()
        for key in keys
        if key in config and not _is_sane(config[key], field == "tied")
    ]
    if not problems:
        try:
            dims = family.dims(config, source.tensors)
            shape = source.tensors[_EMBEDDING].shape if _EMBEDDING in source.tensors else None
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


def _is_sane(value: Any, is_flag: bool) -> bool:
    return type(value) is bool if is_flag else type(value) is int and value > 0


def _block_problems(family: Family, name: str | None, facts: Mapping[str, Any]) -> list[str]:
    block = facts.get("decoder_block", family.decoder_block)
    if block == family.decoder_block:
        return []
    return [
        f"model_name={name} builds MaxText's {block} decoder, but config.json says "
        f"{family.architectures[0]}, which is {family.decoder_block}; name the model it is."
    ]


def _unit(field: str, family: Family) -> int:
    """How many of HF's one of MaxText's is."""
    return family.layers_per_block if field == "layers" else 1


def _may_differ(field: str, ours: Any, theirs: Any, family: Family, typed: bool) -> bool:
    match field:
        case "vocab":  # MaxText's own tables pad some families; the user may pad any
            return family.pads_vocab or (typed and ours > theirs)
        case "layers":  # the first N, as people test
            return typed and 0 < ours < theirs
        case _:
            return False


def _notices(dims: Dims, published: Dims):
    if dims.vocab > published.vocab:
        yield f"vocabulary padded with zeros from {published.vocab} to {dims.vocab} rows"
    if dims.vocab < published.vocab:
        yield f"vocabulary cut from {published.vocab} to {dims.vocab} rows, as MaxText does"
    if dims.layers < published.layers:
        yield f"only the first {dims.layers} of {published.layers} layers"


def _advice(family: Family, name: str | None):
    if name is None and family.train_with:
        yield f"train it with {family.train_with}, or under a model_name of this family"
