"""LoRA adapters (arXiv:2106.09685), merged into the weights they adapt: W + (alpha / r) B A.

For adapters that are converted alone see `adapters.py`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

from maxconv.algebra import AlgebraError, Combine, Expr, Tensor, apply, rearrange, scale, tensors
from maxconv.errors import UserError
from maxconv.models import schema
from maxconv.sources import Source

_PART = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_OTHER = {"A": "B", "B": "A"}

# PEFT accepts any regular expression as a pattern of modules, and matching some takes forever.
# These are safe: names, character classes, alternatives, and repetitions of single characters.
_PATTERN = re.compile(r"\^?(?:[\w/:-]|\.|\\[.dw]|\[[\w-]+\]|(?<!\))[*+?]|[(|)])*\$?", re.ASCII)
_LONGEST_NAME = 128  # of a module, or a pattern
_MOST_STEPS = 1 << 32  # worst case for matching all patterns against all modules


def merged(
    weights: Mapping[str, Expr], adapter: Source, rename: Callable[[str], str]
) -> dict[str, Expr]:
    """The weights with an adapter's products added, in float32.

    Args:
        weights: of the base model, by canonical name.
        adapter: as saved by PEFT: its `config` is adapter_config.json.
        rename: maps a checkpoint's name of a tensor to its canonical name.

    Raises:
        UserError: with every tensor that matches no weight, and everything that is not plain LoRA.
    """
    check(config_problems(adapter.config), adapter)
    found, problems = pairs(adapter, rename, weights.keys())
    problems += missing_parts(found)
    check([*problems, *_pattern_problems(adapter.config, len(found))], adapter)
    alpha_of = alphas(adapter.config)
    result = dict(weights)
    for weight, parts in found.items():
        try:
            result[weight] = _sum(weights[weight], parts, alpha_of, adapter.config)
        except AlgebraError as error:
            problems.append(f"{weight}: {error}")
    check(problems, adapter)
    return result


def check(problems: Iterable[str], adapter: Source) -> None:
    """Raises a UserError about an adapter if there are problems."""
    if found := [f"{adapter.root}: {p}." for p in problems]:
        raise UserError(found)


def pairs(
    adapter: Source, rename: Callable[[str], str], weights: Set[str]
) -> tuple[dict[str, dict[str, Expr]], list[str]]:
    """The factors "A", (rank, inputs), and "B", (outputs, rank), of each adapted weight.

    Args:
        adapter: as saved by PEFT.
        rename: maps a checkpoint's name of a tensor to its canonical name.
        weights: canonical names of the weights that can be adapted.

    Returns:
        The factors by weight, and a sentence for each tensor that matches no weight.
    """
    found: dict[str, dict[str, Expr]] = {}
    problems = []
    for name, info in adapter.tensors.items():
        match = _PART.fullmatch(name)
        weight = rename(f"{match[1]}.weight") if match else ""
        if match is None or len(match[1]) > _LONGEST_NAME or weight not in weights:
            problems.append(f"tensor {name} matches no weight of the model")
            continue
        part: Expr = Tensor(name, info.shape)
        letter = match[3]
        if match[2]:  # an embedding is adapted by the transpose, A' B'
            part, letter = apply(rearrange("i o -> o i"), part), _OTHER[letter]
        if len(info.shape) != 2 or 0 in info.shape:
            problems.append(f"tensor {name} {info.shape} is not a matrix")
            continue
        parts = found.setdefault(weight, {})
        if letter in parts:
            problems.append(f"{next(tensors(parts[letter])).name} and {name} are the same tensor")
        parts[letter] = part
    return found, problems


def missing_parts(found: Mapping[str, Mapping[str, Expr]]) -> Iterator[str]:
    """A sentence for each weight that has only one of the two factors."""
    for weight, parts in found.items():
        yield from (f"{weight}: there is no lora_{part}" for part in _OTHER if part not in parts)


def _sum(
    weight: Expr,
    parts: Mapping[str, Expr],
    alpha_of: Callable[[str], float],
    config: Mapping[str, Any],
) -> Expr:
    product = Combine("matmul", (parts["B"], parts["A"]))
    by = scaling(alpha_of(_module(parts["A"])), parts["A"].shape[0], config)
    whole = Combine("plus", (weight, apply(scale(by), product)))
    _ = whole.shape  # raises when the parts differ
    return whole


def _module(part: Expr) -> str:
    """PEFT's name of the module, which its patterns match."""
    match = _PART.fullmatch(next(tensors(part)).name)
    assert match is not None
    return match[1]


def scaling(alpha: float, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora (arXiv:2312.03732)."""
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def alphas(config: Mapping[str, Any]) -> Callable[[str], float]:
    """A function that returns the alpha of a module by its name.

    The first pattern counts that matches the name or the end of it after a dot, as in PEFT's
    get_pattern_key.
    """
    default = schema.entry(config, "lora_alpha", 8)
    own = [
        (_compiled(pattern), alpha)
        for pattern, alpha in schema.entry(config, "alpha_pattern", {}).items()
    ]

    def alpha_of(module: str) -> float:
        return next((alpha for pattern, alpha in own if pattern.fullmatch(module)), default)

    return alpha_of


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{pattern})")


def _pattern_problems(config: Mapping[str, Any], modules: int) -> Iterator[str]:
    """Sentences about patterns that are invalid or may take too long to match."""
    patterns = schema.entry(config, "alpha_pattern", {})
    for pattern in patterns:
        if not _is_simple(pattern):
            yield (
                f"adapter_config.json: alpha_pattern has {pattern!r}, which is neither the name of "
                "a module nor a simple regular expression; merge it with PEFT first"
            )
    if modules * sum(map(_most_steps, patterns)) > _MOST_STEPS:
        yield (
            "adapter_config.json: alpha_pattern takes too long to match; merge it with PEFT first"
        )


def _is_simple(pattern: str) -> bool:
    if len(pattern) > _LONGEST_NAME or not _PATTERN.fullmatch(pattern):
        return False
    try:
        _compiled(pattern)
    except re.error:
        return False
    return True


def _most_steps(pattern: str) -> int:
    """Upper bound of a match's steps: all positions per repetition, both alternatives per |."""
    repetitions = 1 + sum(pattern.count(c) for c in "*+?")  # one before the pattern
    return _LONGEST_NAME**repetitions << pattern.count("|")


def config_problems(config: Mapping[str, Any], alone: bool = False) -> Iterator[str]:
    """A sentence for everything that is not plain LoRA, or that MaxText lacks if it is `alone`."""
    malformed = [f"adapter_config.json: {p}" for p in schema.problems(config, schema.ADAPTER)]
    if malformed:
        yield from malformed
        return
    if (kind := schema.entry(config, "peft_type", "LORA")) != "LORA":
        yield f"adapter_config.json: peft_type={kind} is not supported; only LORA can be converted"
    for key in ("rank_pattern", "alpha_pattern") if alone else ():
        if config.get(key):
            yield (
                f"adapter_config.json: {key} is not supported for an adapter alone, as MaxText has "
                "one value for all modules; add --hf_model_path= to merge the adapter"
            )
    for key in ("use_dora", "fan_in_fan_out"):
        if config.get(key):
            yield f"adapter_config.json: {key}=true is not supported; merge it with PEFT first"
    if (bias := schema.entry(config, "bias", "none")) != "none":
        yield f"adapter_config.json: bias={bias} is not supported; merge it with PEFT first"
