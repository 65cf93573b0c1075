"""LoRA adapters (arXiv:2106.09685), merged into the weights they adapt: W + (alpha / r) B A.

For those that stay by themselves see `adapters.py`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

from maxconv.algebra import AlgebraError, Combine, Expr, Tensor, apply, rearrange, scale
from maxconv.errors import UserError
from maxconv.sources import Source

_PART = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
_OTHER = {"A": "B", "B": "A"}


def merged(
    weights: Mapping[str, Expr], adapter: Source, rename: Callable[[str], str]
) -> dict[str, Expr]:
    """The weights with an adapter's products added, in float32.

    Args:
        weights: of the base model, by the names of the family's table.
        adapter: as PEFT saves it: `config` is its adapter_config.json.
        rename: from a checkpoint's name of a tensor to the table's.

    Raises:
        UserError: everything in the adapter that fits nothing, or is no plain LoRA.
    """
    found, problems = pairs(adapter, rename, weights.keys())
    problems += config_problems(adapter.config)
    result = dict(weights)
    for weight, parts in found.items():
        try:
            result[weight] = _sum(weights[weight], parts, weight, adapter.config)
        except (AlgebraError, KeyError) as error:
            what = f"there is no lora_{error.args[0]}" if isinstance(error, KeyError) else error
            problems.append(f"{weight}: {what}")
    if problems:
        raise UserError([f"{adapter.root}: {p}." for p in problems])
    return result


def pairs(
    adapter: Source, rename: Callable[[str], str], weights: Set[str]
) -> tuple[dict[str, dict[str, Expr]], list[str]]:
    """The parts "A", (rank, inputs), and "B", (outputs, rank), of each weight that is adapted.

    Args:
        adapter: as PEFT saves it.
        rename: from a checkpoint's name of a tensor to the table's.
        weights: what can be adapted, by the table's names.

    Returns:
        The parts, and a sentence for each tensor that fits nothing.
    """
    found: dict[str, dict[str, Expr]] = {}
    problems = []
    for name, info in adapter.tensors.items():
        match = _PART.fullmatch(name)
        weight = rename(f"{match[1]}.weight") if match else ""
        if match is None or weight not in weights:
            problems.append(f"tensor {name} fits no weight of the model")
            continue
        part: Expr = Tensor(name, info.shape)
        letter = match[3]
        if match[2]:  # an embedding is adapted by the transpose, A' B'
            part, letter = apply(rearrange("i o -> o i"), part), _OTHER[letter]
        found.setdefault(weight, {})[letter] = part
    return found, problems


def _sum(weight: Expr, parts: Mapping[str, Expr], name: str, config: Mapping[str, Any]) -> Expr:
    product = Combine("matmul", (parts["B"], parts["A"]))
    rank = parts["A"].shape[0]
    whole = Combine("plus", (weight, apply(scale(scaling(name, rank, config)), product)))
    _ = whole.shape  # raises when the parts differ
    return whole


def scaling(weight: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora (arXiv:2312.03732); alpha may be a module's own."""
    alpha = config.get("lora_alpha", 8)
    module = weight.removesuffix(".weight")
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = own
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def config_problems(config: Mapping[str, Any], alone: bool = False) -> Iterator[str]:
    """What is no plain LoRA, or is not MaxText's if it is to stand `alone`, each in a sentence."""
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        yield f"adapter_config.json: peft_type={kind} is not supported; only LORA can be converted"
    for key in ("rank_pattern", "alpha_pattern") if alone else ():
        if config.get(key):
            yield (
                f"adapter_config.json: {key} is not supported, as MaxText has one for all; give "
                "the model as --hf_model_path, to merge the adapter"
            )
    for key in ("use_dora", "fan_in_fan_out"):
        if config.get(key):
            yield f"adapter_config.json: {key}=true is not supported; merge it with PEFT first"
    if (bias := config.get("bias", "none")) != "none":
        yield f"adapter_config.json: bias={bias} is not supported; merge it with PEFT first"
