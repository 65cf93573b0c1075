"""What adapter_config.json may say: a plain LoRA, W + s B A, and how large s is.

PEFT's LoraConfig has dozens of entries, and every release adds some that change what an adapter is.
So what is understood is a list, and any other entry that says something is refused.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from maxconv.models import schema

# Entries with a meaning here, and those that change nothing of what is stored: about training, or
# which modules have parts, as the tensors say themselves.
_UNDERSTOOD = frozenset(
    (
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias"),
        *("use_dora", "fan_in_fan_out", "init_lora_weights", "modules_to_save"),
        *("task_type", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        *("auto_mapping", "peft_version", "runtime_config", "eva_config", "ensure_weight_tying"),
        *("megatron_core", "qalora_group_size"),  # which say nothing unless others do
    )
)
# How A and B begin, where the weights beside them stay the published ones. All others (PiSSA,
# OLoRA, CorDA, LoftQ, LoRA-GA) change these, so that the adapter is of weights that nobody has.
_PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")

_MERGE = "merge it with PEFT first"

# PEFT accepts any regular expression as a pattern of modules, and matching some takes forever.
# These are safe: names, character classes, alternatives, and repetitions of single characters.
_PATTERN = re.compile(r"\^?(?:[\w/:-]|\.|\\[.dw]|\[[\w-]+\]|(?<!\))[*+?]|[(|)])*\$?", re.ASCII)
LONGEST_NAME = 128  # of a module, or a pattern
_MOST_STEPS = 1 << 32  # of matching all patterns with all modules, at worst


def config_problems(config: Mapping[str, Any], alone: bool = False) -> Iterator[str]:
    """A sentence for everything that is not plain LoRA, or that MaxText lacks if it is `alone`."""
    for problem in _problems(config, alone):
        yield f"adapter_config.json: {problem}"


def _problems(config: Mapping[str, Any], alone: bool) -> Iterator[str]:
    malformed = [*schema.problems(config, schema.ADAPTER)]
    malformed += [
        f"{key} is null; write the number that it was trained with"
        for key in ("r", "lora_alpha")
        if key in config and config[key] is None
    ]
    if malformed:
        yield from malformed
        return
    if (kind := schema.entry(config, "peft_type", "LORA")) != "LORA":
        yield f"peft_type={kind} is not supported; only LORA can be converted"
    for key in ("rank_pattern", "alpha_pattern") if alone else ():
        if config.get(key):
            yield (
                f"{key} is not supported for an adapter alone, as MaxText has one value for all "
                "modules; add --hf_model_path= to merge the adapter"
            )
    for key in ("use_dora", "fan_in_fan_out"):
        if config.get(key):
            yield f"{key}=true is not supported; {_MERGE}"
    if (bias := schema.entry(config, "bias", "none")) != "none":
        yield f"bias={bias} is not supported; {_MERGE}"
    start = schema.entry(config, "init_lora_weights", True)
    if not any(start is plain or start == plain for plain in _PLAIN_STARTS):
        yield (
            f"init_lora_weights={start} changes the weights that the adapter is of, so it cannot "
            f"be added to those of the model; {_MERGE}"
        )
    for key, value in config.items():
        if value and key not in _UNDERSTOOD:
            yield f"{key} is not understood; {_MERGE}"


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


def pattern_problems(config: Mapping[str, Any], modules: int) -> Iterator[str]:
    """Sentences about patterns that are invalid or may take too long to match."""
    patterns = schema.entry(config, "alpha_pattern", {})
    for pattern in patterns:
        if not _is_simple(pattern):
            yield (
                f"adapter_config.json: alpha_pattern has {pattern!r}, which is neither the name of "
                f"a module nor a simple regular expression; {_MERGE}"
            )
    if modules * sum(map(_most_steps, patterns)) > _MOST_STEPS:
        yield f"adapter_config.json: alpha_pattern takes too long to match; {_MERGE}"


def _is_simple(pattern: str) -> bool:
    if len(pattern) > LONGEST_NAME or not _PATTERN.fullmatch(pattern):
        return False
    try:
        _compiled(pattern)
    except re.error:
        return False
    return True


def _most_steps(pattern: str) -> int:
    """Upper bound of a match's steps: all positions per repetition, both alternatives per |."""
    repetitions = 1 + sum(pattern.count(c) for c in "*+?")  # one before the pattern
    return LONGEST_NAME**repetitions << pattern.count("|")
