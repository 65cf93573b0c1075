"""Quantised checkpoints: each weight as an expression over the packed tensors that are stored.

A codec is a property of the source, which families never see. A box of a weight is pulled back
through it to the packed bytes. Results are float32, unrounded.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from maxconv.algebra import (
    AlgebraError,
    Combine,
    Exp2,
    Expr,
    Nibbles,
    Repeat,
    Tensor,
    apply,
    rearrange,
    renamed,
)
from maxconv.errors import UserError
from maxconv.families import Dims, Family, Row
from maxconv.models.schema import entry

QUANTIZATION = "quantization_config"  # the entry of config.json
SCALE = "_scale_inv"  # suffix of the names of fp8 block scales


@dataclass(frozen=True)
class Codec:
    """A quantisation format.

    Attributes:
        name: for messages.
        mark: name suffix of a tensor that only this format has.
        parts: name suffixes of the packed tensors, after the name of the weight.
        decode: returns the weight, given these and the checkpoint's `quantization_config`.
        others: name suffixes of tensors that decoding does not need.
        dtypes: of the parts; empty for any dtype.
    """

    name: str
    mark: str
    parts: tuple[str, str]
    decode: Callable[[Tensor, Tensor, Mapping[str, Any]], Expr]
    others: tuple[str, ...] = ()
    dtypes: tuple[str, str] = ("", "")

    def misfit(self, parts: Sequence[Tensor], dtypes: Mapping[str, np.dtype]) -> str | None:
        """A phrase if the dtypes of the parts do not match this format, else None."""
        for part, dtype in zip(parts, self.dtypes, strict=True):
            if dtype and (found := dtypes.get(part.name, dtype)) != dtype:
                return f"{part.name} is {found}, where {self.name} has {dtype}"
        return None


def decoded(
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    keep_fp8: bool = False,
    dtypes: Mapping[str, np.dtype] | None = None,
) -> tuple[dict[str, Expr], tuple[str, ...]]:
    """The tensors, with packed ones replaced by the weights they encode.

    Args:
        tensors: all tensors of the checkpoint, by name.
        config: its config.json.
        keep_fp8: leave fp8 weights and their scales as they are.
        dtypes: of the tensors, as they are read.

    Returns:
        The weights, and a notice for each codec that was used.

    Raises:
        UserError: with each packed tensor whose parts do not match.
    """
    weights: dict[str, Expr] = dict(tensors)
    counts: dict[str, int] = {}
    problems = []
    for codec in CODECS[1:] if keep_fp8 else CODECS:
        for mark in [name for name in tensors if name.endswith(codec.mark)]:
            weight = mark.removesuffix(codec.mark)
            packed, scale = (tensors.get(weight + end) for end in codec.parts)
            if packed is None or scale is None:
                continue
            for end in (*codec.parts, *codec.others):
                weights.pop(weight + end, None)
            if weight in weights:
                problems.append(f"{weight} and {packed.name} are the same tensor.")
                continue
            if (misfit := codec.misfit((packed, scale), dtypes or {})) is not None:
                problems.append(f"{misfit}.")
            try:
                weights[weight] = codec.decode(packed, scale, entry(config, QUANTIZATION, {}))
            except AlgebraError as error:
                problems.append(f"{packed.name} is not {codec.name}: {error}.")
            counts[codec.name] = counts.get(codec.name, 0) + 1
    if problems:
        raise UserError(problems)
    return weights, tuple(f"{n} tensors are dequantised from {name}" for name, n in counts.items())


def scale_rows(
    family: Family, dims: Dims, config: Mapping[str, Any], names: Iterable[str]
) -> Iterator[Row]:
    """The rows for fp8 scales that are kept.

    Args:
        family, dims: the model.
        config: its config.json.
        names: canonical names of all tensors.

    Raises:
        UserError: MaxText has no parameters for them.
    """
    scaled = {name.removesuffix(SCALE) for name in names if name.endswith(SCALE)}
    if not scaled:
        return
    if family.in_blocks is None:
        raise UserError(
            f"MaxText has no fp8 weights for {family.architectures[0]}; add --save_dtype=bfloat16 "
            "to dequantise them."
        )
    block, columns = _block_size(entry(config, QUANTIZATION, {}))
    if block != columns:
        raise UserError(
            f"MaxText keeps fp8 weights of square blocks only, but weight_block_size is "
            f"[{block}, {columns}]: add --save_dtype=bfloat16, to dequantise them."
        )
    for r in family.rows(family.in_blocks(dims, block)):
        if not scaled.isdisjoint(r.names()):
            yield replace(
                r, path=f"{r.path}_scale", expr=renamed(r.expr, lambda name: name + SCALE)
            )


def fp8(weight: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Expr:
    """Blocks with a scale each, those at the ends ragged (DeepSeek-V3, inference/kernel.py); or
    one scale for the whole, of shape (), (1,) or (1, 1)."""
    scales: Expr = scale
    if math.prod(scale.shape) == 1:
        return whole_fp8(weight, scale, config)
    if not len(weight.shape) == len(scale.shape) > 1:
        raise AlgebraError(f"a weight {weight.shape} with scales {scale.shape}")
    for axis, k in zip((-2, -1), _block_size(config), strict=True):
        scales = apply(Repeat(axis, k, weight.shape[axis]), scales)
    return _product(weight, scales)


def whole_fp8(weight: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Expr:
    """All of a tensor with the same scale, of as many ones as axes."""
    if math.prod(scale.shape) != 1 or not weight.shape:
        raise AlgebraError(f"a weight {weight.shape} with scales {scale.shape}")
    ones = " ".join("1" for _ in scale.shape), " ".join("1" for _ in weight.shape)
    scales: Expr = apply(rearrange(" -> ".join(ones)), scale)
    for axis, n in enumerate(weight.shape):
        scales = apply(Repeat(axis, n, n), scales)
    return _product(weight, scales)


def _block_size(quantization: Mapping[str, Any]) -> tuple[int, int]:
    rows, columns = entry(quantization, "weight_block_size", (128, 128))
    return rows, columns


def mxfp4(blocks: Tensor, scales: Tensor, config: Mapping[str, Any]) -> Expr:
    """32 numbers share an exponent; rows and columns are exchanged (gpt_oss/torch/weights.py).

    A device takes numbers below 2^-124, which no model has, for zero.
    """
    numbers = apply(Nibbles(2, "fp4"), blocks)
    exponents = apply(Exp2(), apply(rearrange("x o g -> x o g 1"), scales))
    n = numbers.shape[-1]
    product = _product(numbers, apply(Repeat(-1, n, n), exponents))
    return apply(rearrange("x o g n -> x (g n) o"), product)


def int4(packed: Tensor, scale: Tensor, config: Mapping[str, Any]) -> Expr:
    """Eight numbers an int32, a scale for each group of a row (compressed-tensors)."""
    if not packed.shape or not scale.shape or not scale.shape[-1]:
        raise AlgebraError(f"packed numbers {packed.shape} with scales {scale.shape}")
    numbers = apply(Nibbles(8, "int4"), packed)
    n = numbers.shape[-1]
    return _product(numbers, apply(Repeat(-1, n // scale.shape[-1], n), scale))


def _product(numbers: Expr, scales: Expr) -> Expr:
    product = Combine("times", (numbers, scales))
    _ = product.shape  # raises when the parts differ
    return product


CODECS = (
    Codec("fp8", SCALE, ("", SCALE), fp8),
    Codec(
        "fp8 with a scale for each tensor",
        "_scale",
        ("", "_scale"),
        whole_fp8,
        dtypes=("float8_e4m3fn", ""),
    ),
    Codec("MXFP4", "_blocks", ("_blocks", "_scales"), mxfp4, dtypes=("uint8", "uint8")),
    Codec("int4", "_packed", ("_packed", "_scale"), int4, others=("_shape",), dtypes=("int32", "")),
)
