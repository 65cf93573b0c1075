"""What config.json says beside sizes and MaxText computes with: entries, and MaxText's arguments.

The defaults are those of transformers' configuration classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maxconv.families.rope import FULL, SLIDING, Rope, halves, rope_of

Text = Mapping[str, Any]  # the entries of config.json for the decoder


@dataclass(frozen=True)
class Setting:
    """An argument of MaxText and the entries of config.json that decide it.

    Attributes:
        argument: its name.
        entries: the first that is there counts, also if it is null.
        default: if none is there.
        convert: from a value in config.json to that of MaxText; KeyError if MaxText has none.
    """

    argument: str
    entries: tuple[str, ...]
    default: Any
    convert: Callable[[Any], Any] = lambda value: value

    def stated(self, text: Text) -> tuple[str, Any]:
        """The entry that counts and its value."""
        return stated(text, self.entries, self.default)


@dataclass(frozen=True)
class Fixed:
    """Entries of config.json of which MaxText's decoder can only compute one value.

    Attributes:
        entries, default: as those of a `Setting`.
        computed: the value, given the sizes and MaxText's model_name.
        of: reads the value, if it is not that of an entry.
        up_to: whether the value is a number of tokens up to which there is no difference.
    """

    entries: tuple[str, ...]
    default: Any
    computed: Callable[[Any, str], Any]
    of: Callable[[Text], Any] | None = None
    up_to: bool = False

    def stated(self, text: Text) -> tuple[str, Any]:
        """The entry that counts and its value."""
        if self.of is not None:
            return self.entries[0], self.of(text)
        return stated(text, self.entries, self.default)


def stated(text: Text, entries: Sequence[str], default: Any) -> tuple[str, Any]:
    """The first of some entries that is there, and its value."""
    return next(((key, text[key]) for key in entries if key in text), (entries[0], default))


_ACTIVATIONS: dict[str | None, str] = {  # to those of jax.nn, whose gelu is the approximate one
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
}


def _or_zero(value: Any) -> Any:
    return value or 0


def or_none(groups: Any) -> Any:
    """A number of groups; MaxText has -1 for none, which is one."""
    return groups if groups and groups > 1 else -1


def epsilon(default: float = 1e-6) -> Setting:
    return Setting("normalization_layer_epsilon", ("rms_norm_eps",), default)


def activation(default: str = "silu", meant: Mapping[str | None, str] | None = None) -> Setting:
    """`meant`: what transformers takes some values for, in the models of a family."""
    entries, means = ("hidden_activation", "hidden_act"), dict(meant or {})

    def convert(value: Any) -> Any:
        return [_ACTIVATIONS[means.get(value, value)], "linear"]

    return Setting("mlp_activations", entries, default, convert)


def window(default: int | None) -> Setting:
    return Setting("sliding_window_size", ("sliding_window",), default, _or_zero)


def chosen_experts(default: int, *entries: str) -> Setting:
    """How many experts a token is sent to; `entries`: further names of it."""
    return Setting("num_experts_per_tok", ("num_experts_per_tok", *entries), default)


def no_window(default: int | None = None) -> Fixed:
    """Where MaxText's attention has no sliding window."""
    return Fixed(("sliding_window",), default, lambda d, name: None, up_to=True)


def switched_window() -> Fixed:
    """The same, where config.json has a switch for it."""

    def value(text: Text) -> Any:
        return text.get("sliding_window") if text.get("use_sliding_window") else None

    return Fixed(("sliding_window",), None, lambda d, name: None, value, up_to=True)


def layer_kinds(count: Callable[[Any, str], int]) -> Fixed:
    """Where layers of sliding attention are followed by one of full attention, `count` in all."""

    def computed(d: Any, name: str) -> list[str]:
        n = count(d, name)
        return [FULL if (i + 1) % n == 0 else SLIDING for i in range(d.layers)]

    return Fixed(("layer_types",), None, computed)


def normalized_experts(default: bool) -> Fixed:
    """Where MaxText always makes the weights of the chosen experts add up to one."""
    return Fixed(("norm_topk_prob",), default, lambda d, name: True)


SOFT_CAPS = (
    Setting("attn_logits_soft_cap", ("attn_logit_softcapping",), None, _or_zero),
    Setting("final_logits_soft_cap", ("final_logit_softcapping",), None, _or_zero),
)
NOT_BIDIRECTIONAL = Fixed(("use_bidirectional_attention",), None, lambda d, name: None)


@dataclass(frozen=True)
class Computation:
    """How a family computes.

    Attributes:
        settings: what MaxText can be told.
        fixed: what it can't.
        bases: RoPE's default theta by kind of attention.
        rope: MaxText's arguments for the RoPE of full and of sliding attention and the number of
            dimensions; None if it is not compared.
        in_halves: whether the table is made for RoPE that turns halves instead, for given sizes.
        default_rope: `rope_parameters` if config.json has none.
        default_part: how much of a head is turned, if config.json does not say.
        split: RoPE's scaling is for full attention alone.
        turned: the dimensions that RoPE turns, by kind of attention.
        has_sliding: whether some layers have sliding attention.
        scaled_table: the embedding table is scaled in the checkpoint, so that logits need not be.
        names: whether MaxText needs a model_name of the family, to compute as it does.
    """

    settings: tuple[Setting, ...] = (epsilon(), activation())
    fixed: tuple[Fixed, ...] = ()
    bases: Mapping[str, float] | None = None
    rope: Callable[[Rope, Rope, int], Mapping[str, Any]] | None = halves
    in_halves: Callable[[Any], bool] = lambda d: False
    default_rope: Mapping[str, Any] | None = None
    default_part: float = 1.0
    split: bool = False
    turned: Callable[[Any, str], int] = lambda d, attention: d.head_dim
    has_sliding: bool = False
    scaled_table: bool = False
    names: bool = True

    @property
    def thetas(self) -> Mapping[str, float]:
        return self.bases or {FULL: 10_000.0}

    def ropes(self, text: Text) -> tuple[Rope, Rope]:
        """The RoPE of full and of sliding attention; ValueError if config.json makes no sense."""
        defaults: dict[str, Any] = {"partial_rotary_factor": self.default_part}
        if self.default_rope and not (text.get("rope_parameters") or text.get("rope_scaling")):
            defaults["rope_parameters"] = self.default_rope
        told = {key: value for key, value in text.items() if value is not None}
        full, sliding = (
            rope_of(defaults | told, self.thetas, local, self.split) for local in (False, True)
        )
        return full, sliding if self.has_sliding else full
