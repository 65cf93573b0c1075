"""The sizes of a model: their entries in config.json, and the MaxText keys they correspond to."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import Field, dataclass, field
from typing import Any

REQUIRED = object()

LONGEST_AXIS = 2**31 - 1  # XLA indexes an axis with 32 bits
MOST_LAYERS = 4096  # far beyond any model: more is a mistake, or malicious
MOST_EXPERTS = 1 << 16
_NUMBER = re.compile("[0-9]{1,9}")  # ASCII: str.isdigit also takes superscripts, which int refuses


def size(
    *hf: str,
    maxtext: str | None = None,
    default: Any = REQUIRED,
    least: int = 1,
    most: int = LONGEST_AXIS,
    numbered: str = "",
    each: str = "",
    below: str = "",
    only_if: str = "",
) -> Any:
    """Declares a field of `Dims`, and where its value comes from.

    Args:
        hf: the entries of config.json that may have the value, in order of preference. A dot leads
            into a nested entry; entries of a `text_config` are found without that prefix. For
            `per_layer_config.KIND.entry` see `stated`.
        maxtext: the MaxText key with the same meaning.
        default: transformers' default if config.json has no value: a value, or a function of the
            preceding fields, by name. Without a default the first entry is required.
        least, most: the range of a number.
        numbered: for a number of layers, the prefix of their (canonical) tensor names, which a
            layer number follows. The checkpoint must have as many layers as all sizes with this
            prefix add up to.
        each: the field that is the required length of a list.
        below: a field that must be larger than this one.
        only_if: a property without which the value does not matter.
    """
    metadata = {
        "hf": hf,
        "maxtext": maxtext,
        "default": default,
        "least": least,
        "most": most,
        "numbered": numbered,
        "each": each,
        "below": below,
        "only_if": only_if,
    }
    return field(metadata=metadata)


def matters(f: Field, dims: "Dims") -> bool:
    """Whether the value of a field makes a difference in a model of these sizes."""
    return not f.metadata["only_if"] or getattr(dims, f.metadata["only_if"])


def layer_count(*hf: str, numbered: str, least: int = 1, **others: Any) -> Any:
    """A `size` that is a number of layers, each of which has tensors of its own."""
    return size(*hf, numbered=numbered, least=least, most=MOST_LAYERS, **others)


def number_after(name: str, prefix: str) -> int | None:
    """The number that follows `prefix` in the name of a tensor, up to a dot; None if none does."""
    if not name.startswith(prefix):
        return None
    part = name[len(prefix) :].partition(".")[0]
    return int(part) if _NUMBER.fullmatch(part) else None


PER_LAYER = "per_layer_config"  # the entry of config.json that has what differs between layers
DECODER_LAYERS = "model.layers."  # prefix of the tensor names of decoder layers


@dataclass(frozen=True, kw_only=True)
class Dims:
    """The sizes of a decoder, in MaxText's terms. Families that need more subclass it.

    Attributes:
        vocab: MaxText's, which may be padded.
        layers: may be fewer than the checkpoint has.
        tied: whether logits are computed with the embedding table.
        moe_mlp: the width of an expert.
        multimodal, audio: whether to include the vision and the audio encoder.
        mtp: number of layers for multi-token prediction, after the others.
    """

    emb: int = size("hidden_size", maxtext="base_emb_dim")
    mlp: int = size("intermediate_size", maxtext="base_mlp_dim")
    heads: int = size("num_attention_heads", maxtext="base_num_query_heads")
    kv_heads: int = size(
        "num_key_value_heads", maxtext="base_num_kv_heads", default=lambda d: d["heads"]
    )
    head_dim: int = size("head_dim", maxtext="head_dim", default=lambda d: d["emb"] // d["heads"])
    layers: int = layer_count(
        "num_hidden_layers", maxtext="base_num_decoder_layers", numbered=DECODER_LAYERS
    )
    vocab: int = size("vocab_size", maxtext="vocab_size")
    tied: bool = size("tie_word_embeddings", maxtext="logits_via_embedding", default=True)
    experts: int = size(
        "num_experts", "num_local_experts", maxtext="num_experts", default=1, most=MOST_EXPERTS
    )
    moe_mlp: int = size("moe_intermediate_size", maxtext="base_moe_mlp_dim", default=-1)
    multimodal: bool = size(maxtext="use_multimodal", default=False)
    audio: bool = size(maxtext="use_audio", default=False)
    mtp: int = size(maxtext="mtp_num_layers", default=0, least=0, most=MOST_LAYERS)


def stated_sizes(hf_config: Mapping[str, Any], f: Field) -> dict[str, Any]:
    """The entries of a config.json for a field of Dims, in order of preference."""
    return stated(hf_config, f.metadata["hf"])


def text_entries(hf_config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json for its decoder, which may be nested in others."""
    view = dict(hf_config)
    for nested in ("thinker_config", "text_config"):
        inner = view.get(nested)
        if isinstance(inner, Mapping):
            said = {key: value for key, value in view.items() if value is not None}
            view = dict(inner) | said  # the outer entry wins: tie_word_embeddings
    return view


def stated(hf_config: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The given entries that a config.json has, with their values; for their syntax see `size`.

    `per_layer_config.KIND.entry` is that of the layers of a kind in layer_types, by the name it
    really has: per_layer_config.05.entry, or just that of all layers if theirs is not another
    (transformers heterogeneity/configuration_utils.py, since 5.15).
    """
    view, found = text_entries(hf_config), {}
    for key in keys:
        parts = key.split(".")
        if parts[0] == PER_LAYER and len(parts) > 1:
            parts = _of_kind(view, *parts[1:])
        value: Any = view
        for part in parts:
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            found[".".join(parts)] = value
    return found


def _of_kind(view: Mapping[str, Any], kind: str, *entry: str) -> list[str]:
    """The path of an entry of the layers of a kind."""
    layers, kinds = view.get(PER_LAYER), view.get("layer_types")
    if not isinstance(layers, Mapping):
        return [PER_LAYER, kind, *entry]
    for key, own in layers.items():
        number = int(key) if _NUMBER.fullmatch(key) else -1
        if isinstance(kinds, list) and kinds[number : number + 1] != [kind]:
            continue
        if number >= 0 and (not isinstance(own, Mapping) or own.keys() >= set(entry)):
            return [PER_LAYER, key, *entry]
    return list(entry) or [PER_LAYER, kind]
