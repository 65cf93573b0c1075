"""LoRA adapters (arXiv:2106.09685), merged into the weights they adapt: W + (alpha / r) B A."""

import math
import re
from collections.abc import Callable, Iterator, Mapping
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
    problems = [*_config_problems(adapter.config)]
    pairs: dict[str, dict[str, Expr]] = {}
    for name, info in adapter.tensors.items():
        found = _PART.fullmatch(name)
        weight = rename(f"{found[1]}.weight") if found else ""
        if found is None or weight not in weights:
            problems.append(f"tensor {name} fits no weight of the model")
            continue
        part: Expr = Tensor(name, info.shape)
        letter = found[3]
        if found[2]:  # an embedding is adapted by the transpose, A' B'
            part, letter = apply(rearrange("i o -> o i"), part), _OTHER[letter]
        pairs.setdefault(weight, {})[letter] = part
    result = dict(weights)
    for weight, parts in pairs.items():
        try:
            result[weight] = _sum(weights[weight], parts, weight, adapter.config)
        except (AlgebraError, KeyError) as error:
            what = f"there is no lora_{error.args[0]}" if isinstance(error, KeyError) else error
            problems.append(f"{weight}: {what}")
    if problems:
        raise UserError([f"{adapter.root}: {p}." for p in problems])
    return result


def _sum(weight: Expr, parts: Mapping[str, Expr], name: str, config: Mapping[str, Any]) -> Expr:
    product = Combine("matmul", (parts["B"], parts["A"]))
    rank = parts["A"].shape[0]
    whole = Combine("plus", (weight, apply(scale(_scaling(name, rank, config)), product)))
    _ = whole.shape  # raises when the parts differ
    return whole


def _scaling(weight: str, rank: int, config: Mapping[str, Any]) -> float:
    """alpha / r, or alpha / sqrt(r) with rslora (arXiv:2312.03732); alpha may be a module's own."""
    alpha = config.get("lora_alpha", 8)
    module = weight.removesuffix(".weight")
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = own
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        yield f"adapter_config.json: peft_type={kind} is not supported; only LORA can be merged"
    for key in ("use_dora", "fan_in_fan_out"):
        if config.get(key):
            yield f"adapter_config.json: {key}=true is not supported; merge it with PEFT first"
    if (bias := config.get("bias", "none")) != "none":
        yield f"adapter_config.json: bias={bias} is not supported; merge it with PEFT first"
