"""Rotary position embeddings: what config.json says of them, and the MaxText arguments for that.

Two are the same if they turn the same dimensions by the same angles, so frequencies are compared,
not names. transformers modeling_rope_utils.py; MaxText layers/attentions.py, layers/embeddings.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FULL, SLIDING = "full_attention", "sliding_attention"

# MaxText's llama3.1 has these built in.
LLAMA3 = {
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4,
    "original_max_position_embeddings": 8192,
}
_FINE = 10**12  # MaxText takes turns in this many positions as whole numbers
_AS_DEFAULT = ("default", "mrope", "dynamic")  # dynamic: up to the length it was trained with


@dataclass(frozen=True)
class Rope:
    """RoPE as transformers has it.

    Attributes:
        kind: transformers' rope_type.
        base: theta, radians per position are its powers.
        entries: what else `rope_scaling` or `rope_parameters` has.
        longest: the longest sequence, in tokens.
    """

    kind: str
    base: float
    entries: Mapping[str, Any] = field(default_factory=dict)
    longest: int = 0

    def number(self, key: str, default: float | None = None) -> float:
        """An entry; ValueError if it is not a number."""
        value = self.entries.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} of rope_type={self.kind} is {value!r}, not a number")
        return value

    @property
    def original(self) -> float:
        """The longest sequence before positions were scaled, in tokens."""
        return self.number("original_max_position_embeddings", self.longest)

    @property
    def amplitude(self) -> float:
        """What queries and keys are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        factor = self.number("factor")
        all_dim = self.number("mscale_all_dim", 0)
        scale = self.number("mscale", 0)
        both = scale and all_dim
        inferred = _mscale(factor, scale) / _mscale(factor, all_dim) if both else _mscale(factor, 1)
        return self.number("attention_factor", inferred)

    def frequencies(self, dims: int) -> np.ndarray | None:
        """Radians per position of each pair of `dims` dimensions; None if they are not known."""
        part = self.number("partial_rotary_factor", 1)
        if self.kind == "proportional":
            turned = int(part * dims // 2)
            found = self.base ** -(2 * np.arange(turned) / dims) / self.number("factor", 1)
            return np.pad(found, (0, dims // 2 - turned))
        dims = int(part * dims)
        plain = self.base ** -(np.arange(0, dims, 2) / dims)
        if self.kind in _AS_DEFAULT:
            return plain
        if self.kind == "linear":
            return plain / self.number("factor")
        if self.kind == "llama3":
            kept = self._kept_llama3(plain)
        elif self.kind == "yarn":
            kept = self._kept_yarn(dims)
        else:
            return None
        return plain * (kept + (1 - kept) / self.number("factor"))

    def _kept_llama3(self, plain: np.ndarray) -> np.ndarray:
        """How much of each frequency is not divided by the factor."""
        low, high = self.number("low_freq_factor"), self.number("high_freq_factor")
        turns = self.original * plain / (2 * math.pi)
        return np.clip((turns - low) / ((high - low) or 1e-9), 0, 1)

    def _kept_yarn(self, dims: int) -> np.ndarray:
        """The same, for YaRN."""

        def dimension(turns: float) -> float:
            return (
                dims * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.base))
            )

        low = dimension(self.number("beta_fast", 32))
        high = dimension(self.number("beta_slow", 1))
        if self.entries.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dims - 1)
        return 1 - np.clip((np.arange(dims // 2) - low) / ((high - low) or 0.001), 0, 1)


def rope_of(text: Mapping[str, Any], thetas: Mapping[str, float], local: bool, split: bool) -> Rope:
    """The RoPE that config.json states for layers of one kind of attention.

    Args:
        text: the entries of config.json for the decoder.
        thetas: by kind of attention, if there is no entry; `SLIDING` may be absent.
        local: for layers of sliding attention, not of full.
        split: entries that are not given by kind of attention are for full attention alone, but
            for a `rope_theta` where `thetas` has one for both.

    Raises:
        ValueError: an entry is not what it should be.
    """
    attention = SLIDING if local else FULL
    new, old = (_object(text, key) for key in ("rope_parameters", "rope_scaling"))
    by_kind = FULL in new or SLIDING in new
    theta = text.get("rope_theta")
    if split and local:
        theta = text.get("rope_local_base_freq") if SLIDING in thetas else theta
    alone = split and local and not by_kind
    entries = _object(new, attention) if by_kind else {} if alone else {**old, **new}
    entries = {"partial_rotary_factor": text.get("partial_rotary_factor"), **entries}
    kind = entries.get("rope_type") or entries.get("type") or "default"
    theta = entries.get("rope_theta") or theta or thetas.get(attention, thetas[FULL])
    longest = text.get("max_position_embeddings") or 0
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 1:
        raise ValueError(f"rope_theta is {theta!r}, not a number above 1")
    if type(longest) is not int:
        raise ValueError(f"max_position_embeddings is {longest!r}, not a whole number")
    return Rope(str(kind), theta, entries, longest)


def _object(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} is {value!r}, not an object")
    return dict(value)


def maxtext_rope(values: Mapping[str, Any], attention: str) -> Rope:
    """What MaxText computes with these values of all its arguments."""
    base, block = values["rope_max_timescale"], values["decoder_block"]
    if values["use_mrope"] or block in ("qwen3_next", "qwen3_5"):
        return Rope("default", base, {"partial_rotary_factor": values["partial_rotary_factor"]})
    if values["rope_type"] == "llama3.1" or values["model_name"].startswith("llama3.1"):
        return Rope("llama3" if values["rope_use_scale"] else "default", base, LLAMA3)
    if values["rope_type"] == "yarn":
        entries = {key: values[key] for key in ("beta_fast", "beta_slow")}
        entries["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        entries |= {"factor": values["rope_factor"], "truncate": values["rope_truncate"]}
        if not values["rope_attention_scaling"]:
            entries["attention_factor"] = 1
        return Rope("yarn", base, entries, values["max_position_embeddings"])
    which = "local" if attention == SLIDING else "global"
    if values[f"{which}_rope_max_timescale"] > 0 and (which == "local" or "gemma4" in block):
        base = values[f"{which}_rope_max_timescale"]
    if "gemma4" in block:
        part = values[f"{which}_rope_proportion"]
        return Rope("proportional", base, {"partial_rotary_factor": part})
    unscaled = block == "gemma3" and attention == SLIDING
    factor = 1 if unscaled else values["rope_linear_scaling_factor"]
    return Rope("linear", base, {"factor": factor})


def difference(one: Rope, other: Rope, dims: int) -> tuple[int, float]:
    """How many frequencies differ, and by how much: 0.1 if the larger is 1.1 of the smaller."""
    ours, theirs = one.frequencies(dims), other.frequencies(dims)
    if ours is None or theirs is None or ours.shape != theirs.shape:
        return dims // 2, math.inf
    low, high = np.minimum(ours, theirs), np.maximum(ours, theirs)
    ratio = np.divide(high, low, out=np.full_like(high, np.inf), where=low > 0)
    ratio[high == low] = 1
    off = ratio - 1
    return int((off > 1e-6).sum()), float(off.max(initial=0))


def halves(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments where MaxText turns the halves of a head, as transformers does."""
    if full.kind in ("yarn", "llama3"):
        yarn = full if full.kind == "yarn" else _nearest_yarn(full, dims)
        return {"rope_interleave": False, **_yarn(yarn)}
    return {"rope_type": "default", **_theta(full), **_linear(full)}


def pairs(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments where MaxText turns neighbours: the weights are in that order."""
    scaled = full.kind == "llama3"
    if full.kind == "yarn":
        return {"rope_interleave": True, **_yarn(full)}
    if scaled and any(full.number(key) != n for key, n in LLAMA3.items()):
        return {"rope_interleave": True, **_yarn(_nearest_yarn(full, dims))}
    return {"rope_type": "llama3.1", "rope_use_scale": scaled, **_theta(full)}


def latent(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments for DeepSeek's attention, where only MaxText's YaRN turns neighbours."""
    if full.kind != "yarn":
        same = {"rope_factor": 1, "max_position_embeddings": full.longest}
        return {"rope_type": "yarn", **same, **_theta(full)}
    mscale = full.number("mscale_all_dim", 0)  # of the softmax
    return {**_yarn(full), "mscale": mscale, "rope_attention_scaling": full.amplitude != 1}


def partial(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments where a part of each head is turned, perhaps by positions in an image."""
    found = {**_theta(full), "partial_rotary_factor": full.number("partial_rotary_factor", 1)}
    section = full.entries.get("mrope_section")
    return found | ({"mrope_section": section} if section else {})


def theta_alone(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments where only theta can be chosen."""
    return _theta(full)


def gemma3(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments where sliding attention has a theta of its own, and no scaling."""
    return {**_theta(full), **_linear(full), "local_rope_max_timescale": _whole(sliding.base)}


def gemma4(full: Rope, sliding: Rope, dims: int) -> dict[str, Any]:
    """The arguments where both kinds of attention have a theta and a part of their own."""
    found = {"global_rope_max_timescale": _whole(full.base), **_theta(full)}
    found["local_rope_max_timescale"] = _whole(sliding.base)
    for which, rope in ("global", full), ("local", sliding):
        found[f"{which}_rope_proportion"] = rope.number("partial_rotary_factor", 1)
    return found


def _theta(rope: Rope) -> dict[str, Any]:
    return {"rope_max_timescale": _whole(rope.base)}


def _linear(rope: Rope) -> dict[str, Any]:
    factor = rope.number("factor") if rope.kind == "linear" else 1.0
    return {"rope_linear_scaling_factor": factor}


def _yarn(rope: Rope) -> dict[str, Any]:
    """The arguments of MaxText's YaRN."""
    return {
        "rope_type": "yarn",
        **_theta(rope),
        "rope_factor": _whole(rope.number("factor")),
        "beta_fast": _whole(rope.number("beta_fast", 32)),
        "beta_slow": _whole(rope.number("beta_slow", 1)),
        "original_max_position_embeddings": _whole(rope.original),
        "max_position_embeddings": rope.longest or _whole(rope.original),
        "rope_truncate": bool(rope.entries.get("truncate", True)),
        "rope_attention_scaling": rope.amplitude != 1,
    }


def _nearest_yarn(rope: Rope, dims: int) -> Rope:
    """The YaRN that is nearest to a llama3 of other numbers than MaxText's own.

    Both keep the high frequencies and divide the low ones. In between a YaRN goes in a straight
    line over the dimensions, which meets two of a llama3's frequencies; there are few.
    """
    plain = rope.base ** -(np.arange(0, dims, 2) / dims)
    left = 1 - rope._kept_llama3(plain)  # of each frequency, is divided
    inner = [i for i in range(dims // 2) if 0 < left[i] < 1]
    first = inner[0] if inner else int((left == 0).sum())
    last = inner[-1] if inner else first - 1
    points = [(first - 1, 0.0), *((i, left[i]) for i in inner), (last + 1, 1.0)]
    lines = ((p, q) for n, p in enumerate(points) for q in points[n + 1 :])
    tried = [_yarn_through(rope, *line, dims) for line in lines]
    return min(tried, key=lambda one: difference(rope, one, dims)[1])


def _yarn_through(rope: Rope, one: tuple[int, float], other: tuple[int, float], dims: int) -> Rope:
    """A YaRN by two of its pairs of dimensions, each with how much of its frequency is divided."""
    slope = (other[1] - one[1]) / (other[0] - one[0])
    low, high = one[0] - one[1] / slope, one[0] + (1 - one[1]) / slope
    turns = (_FINE / (2 * math.pi) * rope.base ** (-2 * end / dims) for end in (low, high))
    beta_fast, beta_slow = (max(round(n), 1) for n in turns)
    entries = {
        "factor": rope.entries.get("factor"),
        "beta_fast": beta_fast,
        "beta_slow": beta_slow,
        "original_max_position_embeddings": _FINE,
        "truncate": False,
        "attention_factor": 1,
    }
    return Rope("yarn", rope.base, entries, rope.longest or _whole(rope.original))


def _whole(number: float) -> int:
    """MaxText takes no fractions here."""
    return round(number)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
