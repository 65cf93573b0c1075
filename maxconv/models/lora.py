"""LoRA adapters (arXiv:2106.09685), merged into the weights they adapt: W + (alpha / r) B A.

For adapters that are converted alone see `adapters.py`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

from maxconv.algebra import AlgebraError, Combine, Expr, Tensor, apply, rearrange, scale, tensors
from maxconv.errors import UserError
from maxconv.families import Dims, Family
from maxconv.models.adapter_config import (
    LONGEST_NAME,
    alphas,
    config_problems,
    pattern_problems,
    scaling,
)
from maxconv.models.stored_names import EMBEDDING, HEAD
from maxconv.sources import Source
from maxconv.sources.safetensors import some

# Names in an adapter: of one of the two parts of a module; of a whole weight. What PEFT has in
# memory and other programs save, too, is the adapter's own name in them, such as `.default`.
_BASE = r"(?:base_model\.model\.)?"
_PART = re.compile(
    rf"{_BASE}(.+)\.lora_(embedding_)?([AB])(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.weight)?"
)
_WHOLE = re.compile(rf"{_BASE}(.+?)(?:\.base_layer|\.modules_to_save\.[^.]+)?\.(weight|bias)")
_OTHER = {"A": "B", "B": "A"}

Rename = Callable[[str], str]


def merged(weights: Mapping[str, Expr], adapter: Source, rename: Rename) -> dict[str, Expr]:
    """The weights with an adapter's products added, in float32, and its whole weights as theirs.

    Args:
        weights: of the base model, by canonical name.
        adapter: as saved by PEFT: its `config` is adapter_config.json.
        rename: maps a checkpoint's name of a tensor to its canonical name.

    Raises:
        UserError: with every tensor that matches no weight, and everything that is not plain LoRA.
    """
    whole, problems = _whole_weights(adapter, rename, weights)
    result = {**weights, **whole}
    found, others = pairs(adapter, rename, result.keys())
    problems = [*config_problems(adapter.config), *problems, *others, *missing_parts(found)]
    if not (whole or found or problems):
        problems.append("it has no tensors, so there is nothing to merge; take it out")
    check(problems, adapter)
    check(pattern_problems(adapter.config, len(found)), adapter)
    alpha_of = alphas(adapter.config)
    for weight, parts in found.items():
        try:
            result[weight] = _sum(result[weight], parts, alpha_of, adapter.config)
        except AlgebraError as error:
            problems.append(f"{weight}: {error}")
    check(problems, adapter)
    return result


def check(problems: Iterable[str], adapter: Source) -> None:
    """Raises a UserError about an adapter if there are problems."""
    if found := [f"{adapter.root}: {p}." for p in problems]:
        raise UserError(found)


def left_out(
    source: Source, family: Family, dims: Dims, weights: Mapping[str, Expr]
) -> Iterator[str]:
    """A sentence if an adapter is of weights that are left out, such as those of an encoder.

    Raises:
        UserError: it is of no others.
    """
    if (adapter := source.adapter) is None:
        return
    reached, lost = set[str](), set[str]()
    for name, weight in weights.items():
        own = (t.name for t in tensors(weight) if t.name in adapter.tensors)
        (lost if family.leaves_out(name, dims) else reached).update(own)
    if not lost:
        return
    audio = " or use_audio=True" if family.audio_patterns else ""
    mend = f"add use_multimodal=True{audio} to include" if family.encoders else ""
    what = f"{len(lost)} of its {len(adapter.tensors)} tensors adapt weights that are left out"
    if not reached:
        check([f"{what}; {f'{mend} them' if mend else 'take the adapter out'}"], adapter)
    yield f"{adapter.root}: {what}: {some(sorted(lost))}{mend and f'; {mend} them'}"


def is_part(name: str) -> bool:
    """Whether a tensor is one of the two parts of an adapter."""
    return _PART.fullmatch(name) is not None


def adapted_head(expr: Expr) -> str | None:
    """What is wrong with a head that is the embedding table, if an adapter has parts of its own."""
    part = next((t.name for t in tensors(expr) if is_part(t.name)), None)
    return part and _of_tied_head(part)


def _of_tied_head(name: str) -> str:
    return (
        f"tensor {name} adapts lm_head, which is the embedding table (tie_word_embeddings); merge "
        "it with PEFT first"
    )


def _whole_weights(
    adapter: Source, rename: Rename, weights: Mapping[str, Expr]
) -> tuple[dict[str, Expr], list[str]]:
    """The weights that an adapter has whole (modules_to_save), and what fits nothing.

    A head may be new: then the model's was the embedding table.
    """
    found: dict[str, Expr] = {}
    problems = []
    for name, info in adapter.tensors.items():
        match = None if is_part(name) else _WHOLE.fullmatch(name)
        weight = rename(f"{match[1]}.{match[2]}") if match else ""
        base = weights.get(EMBEDDING if weight == HEAD and HEAD not in weights else weight)
        if match is None or base is None:
            continue  # `pairs` names it
        if base.shape != info.shape:
            problems.append(
                f"tensor {name} {info.shape} matches no weight of the model: {weight} is "
                f"{base.shape}"
            )
        if weight in found:
            other = next(tensors(found[weight])).name
            problems.append(f"{other} and {name} are the same tensor")
        found[weight] = Tensor(name, info.shape)
    return found, problems


def pairs(
    adapter: Source, rename: Rename, weights: Set[str], alone: bool = False
) -> tuple[dict[str, dict[str, Expr]], list[str]]:
    """The factors "A", (rank, inputs), and "B", (outputs, rank), of each adapted weight.

    Args:
        adapter: as saved by PEFT.
        rename: maps a checkpoint's name of a tensor to its canonical name.
        weights: canonical names of the weights that can be adapted.
        alone: whether the adapter is converted alone, and so may not contain whole weights.

    Returns:
        The factors by weight, and a sentence for each tensor that matches no weight.
    """
    found: dict[str, dict[str, Expr]] = {}
    problems = []
    for name, info in adapter.tensors.items():
        match = _PART.fullmatch(name)
        if match is None and not alone and _is_whole(name, rename, weights):
            continue
        weight = rename(f"{match[1]}.weight") if match else ""
        if weight == HEAD and HEAD not in weights and EMBEDDING in weights:
            problems.append(_of_tied_head(name))
            continue
        if match is None or len(match[1]) > LONGEST_NAME or weight not in weights:
            problems.append(f"tensor {name} matches no weight of the model")
            continue
        part: Expr = Tensor(name, info.shape)
        letter = match[3]
        if 0 in info.shape:
            problems.append(
                f"tensor {name} {info.shape} is empty, as DeepSpeed ZeRO-3 leaves it; save it "
                "again with the parameters gathered"
            )
            continue
        if len(info.shape) != 2:
            problems.append(f"tensor {name} {info.shape} is not a matrix")
            continue
        if match[2]:  # an embedding is adapted by the transpose, A' B'
            part, letter = apply(rearrange("i o -> o i"), part), _OTHER[letter]
        parts = found.setdefault(weight, {})
        if letter in parts:
            problems.append(f"{next(tensors(parts[letter])).name} and {name} are the same tensor")
        parts[letter] = part
    return found, problems


def _is_whole(name: str, rename: Rename, weights: Set[str]) -> bool:
    match = _WHOLE.fullmatch(name)
    return match is not None and rename(f"{match[1]}.{match[2]}") in weights


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
