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
    Repeat,
    Slice,
    Tensor,
    Unpack,
    apply,
    rearrange,
    renamed,
)
from maxconv.errors import UserError
from maxconv.families import Dims, Family, Row, text_entries
from maxconv.models.schema import entry, is_block

QUANTIZATION = "quantization_config"  # the entry of config.json
SCALE = "_scale_inv"  # suffix of the names of fp8 block scales
PLAIN = "convert a release in bfloat16 or block fp8"  # what mends whatever is not read


@dataclass(frozen=True)
class Codec:
    """A quantisation format.

    Attributes:
        name: for messages; `{bits}` stands for the bits of packed integers.
        parts: name suffixes of the packed tensors, after the name of the weight. The last is one
            that only such formats have.
        decode: returns the weight, given these and the checkpoint's `quantization_config`.
        dtypes: of the parts; empty for any dtype.
        others: name suffixes of tensors that decoding does not need.
    """

    name: str
    parts: tuple[str, ...]
    decode: Callable[..., Expr]
    dtypes: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def misfit(self, parts: Sequence[Tensor], dtypes: Mapping[str, np.dtype]) -> str | None:
        """A phrase if the dtypes of the parts do not match this format, else None."""
        for part, dtype in zip(parts, self.dtypes, strict=False):
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
    quantization = _quantization(config)
    counts: dict[str, int] = {}
    problems: list[str] = []
    misfits: dict[str, str] = {}  # by the name of the part that tells
    for codec in CODECS[1:] if keep_fp8 else CODECS:
        name = codec.name.format(bits=packed_bits(quantization))
        for mark in [name for name in weights if name.endswith(codec.parts[-1])]:
            weight = mark.removesuffix(codec.parts[-1])
            parts = [tensors[weight + end] for end in codec.parts if weight + end in weights]
            if len(parts) < len(codec.parts):
                continue
            if misfit := codec.misfit(parts, dtypes or {}):
                misfits[mark] = misfit.replace(codec.name, name)
                continue
            misfits.pop(mark, None)
            for end in (*codec.parts, *codec.others):
                weights.pop(weight + end, None)
            if weight in weights:
                problems.append(f"{weight} and {parts[0].name} are the same tensor.")
                continue
            try:
                weights[weight] = codec.decode(*parts, quantization)
            except AlgebraError as error:
                problems.append(f"{parts[0].name} is not {name}: {error}.")
            counts[name] = counts.get(name, 0) + 1
    problems += [f"{misfit}; {PLAIN}." for misfit in misfits.values()]
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
    block, columns = _block_size(_quantization(config))
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


def scaled(weight: Tensor, scale: Tensor, quantization: Mapping[str, Any]) -> Expr:
    """Numbers with a scale for the whole tensor, of shape (), (1,) or (1, 1); for each row, (rows,)
    or (rows, 1); or for each block, those at the ends ragged (DeepSeek-V3, inference/kernel.py)."""
    return _product(weight, _spread(scale, weight.shape, quantization))


def shifted(weight: Tensor, scale: Tensor, zero: Tensor, quantization: Mapping[str, Any]) -> Expr:
    """The same with a zero for each scale: (number - zero) x scale (compressed-tensors)."""
    zeros, scales = (_spread(x, weight.shape, quantization) for x in (zero, scale))
    return _product(Combine("minus", (weight, zeros)), scales)


def _spread(scale: Expr, shape: tuple[int, ...], quantization: Mapping[str, Any]) -> Expr:
    """A scale for every number of a weight of this shape."""
    axes = [f"x{i}" for i in range(len(shape))]
    if shape and math.prod(scale.shape) == 1:
        ones = (" ".join("1" for _ in s) for s in (scale.shape, shape))
        scale = apply(rearrange(" -> ".join(ones)), scale)
    elif shape and scale.shape == shape[:-1]:
        rows = " ".join(axes[:-1])
        scale = apply(rearrange(f"{rows} -> {rows} 1"), scale)
    if not len(shape) == len(scale.shape) > 0:
        raise AlgebraError(f"a weight {shape} with scales {scale.shape}")
    blocks = (*(1 for _ in shape[2:]), *_block_size(quantization))[-len(shape) :]
    for axis, (n, k) in enumerate(zip(shape, blocks, strict=True)):
        if scale.shape[axis] != n:
            each = n if scale.shape[axis] == 1 else k
            scale = apply(Repeat(axis, max(each, 1), n), scale)
    return scale


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of it, which may be nested with what it says of the decoder."""
    return entry(text_entries(config), QUANTIZATION, {})


def unquantised(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without that, of any part of the model."""
    return {
        key: unquantised(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if key != QUANTIZATION
    }


def _block_size(quantization: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block, by default those of DeepSeek-V3."""
    stated = [quantization.get("weight_block_size")]
    stated += [weights.get("block_structure") for weights in _groups(quantization)]
    rows, columns = next((block for block in stated if block and is_block(block)), (128, 128))
    return rows, columns


def packed_bits(quantization: Mapping[str, Any]) -> int:
    """Bits of packed integers; 0 if those of groups of weights differ."""
    found = {n for weights in _groups(quantization) if type(n := weights.get("num_bits")) is int}
    return found.pop() if len(found) == 1 else 0 if found else 4


def _groups(quantization: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """How weights are quantised, by groups of modules (compressed-tensors)."""
    groups = entry(quantization, "config_groups", {})
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = entry(group, "weights", {}) if isinstance(group, Mapping) else {}
        if isinstance(weights, Mapping):
            yield weights


def mxfp4(blocks: Tensor, scales: Tensor, config: Mapping[str, Any]) -> Expr:
    """32 numbers share an exponent; rows and columns are exchanged (gpt_oss/torch/weights.py).

    A device takes numbers below 2^-124, which no model has, for zero.
    """
    numbers = apply(Unpack(2, "fp4"), blocks)
    exponents = apply(Exp2(), apply(rearrange("x o g -> x o g 1"), scales))
    n = numbers.shape[-1]
    product = _product(numbers, apply(Repeat(-1, n, n), exponents))
    return apply(rearrange("x o g n -> x (g n) o"), product)


def packed_integers(
    packed: Tensor, scale: Tensor, quantization: Mapping[str, Any], zero: Expr | None = None
) -> Expr:
    """Integers packed into int32, a scale for each group of a row (compressed-tensors)."""
    if not packed.shape or not scale.shape or not scale.shape[-1]:
        raise AlgebraError(f"packed numbers {packed.shape} with scales {scale.shape}")
    numbers = apply(_unpack(quantization), packed)
    n = numbers.shape[-1]
    wide = Repeat(-1, max(n // scale.shape[-1], 1), n)
    if zero is not None:
        numbers = Combine("minus", (numbers, apply(wide, zero)))
    return _product(numbers, apply(wide, scale))


def with_zeros(
    packed: Tensor, scale: Tensor, zero: Tensor, quantization: Mapping[str, Any]
) -> Expr:
    """The same with a zero for each scale, as int8."""
    if zero.shape != scale.shape:
        raise AlgebraError(f"{zero.name} {zero.shape} for scales {scale.shape}")
    return packed_integers(packed, scale, quantization, zero)


def with_packed_zeros(
    packed: Tensor, scale: Tensor, zero: Tensor, quantization: Mapping[str, Any]
) -> Expr:
    """The same with zeros that are packed as well: those of the rows of a column in one int32."""
    unpack = _unpack(quantization)
    rows = scale.shape[0] if scale.shape else 0
    if len(scale.shape) != 2 or zero.shape != (-(-rows // unpack.per), scale.shape[1]):
        raise AlgebraError(f"{zero.name} {zero.shape} for scales {scale.shape}")
    zeros = apply(unpack, apply(rearrange("r g -> g r"), zero))
    zeros = apply(rearrange("g r -> r g"), apply(Slice(1, 0, rows), zeros))
    return packed_integers(packed, scale, quantization, zeros)


def _unpack(quantization: Mapping[str, Any]) -> Unpack:
    if (bits := packed_bits(quantization)) not in (4, 8):
        raise AlgebraError("packed integers of 4 or 8 bits are read")
    return Unpack(32 // bits, "int4" if bits == 4 else "int8")


def _product(numbers: Expr, scales: Expr) -> Expr:
    product = Combine("times", (numbers, scales))
    _ = product.shape  # raises when the parts differ
    return product


_WHOLE = ("", "_scale")
_ZERO = "_zero_point"
_PACKED = ("_packed", "_scale")
_SHAPE = ("_shape",)
CODECS = (
    Codec("fp8", ("", SCALE), scaled),
    Codec("asymmetric int8", (*_WHOLE, _ZERO), shifted, ("int8", "", "int8")),
    Codec("fp8 with weight_scale", _WHOLE, scaled, ("float8_e4m3fn",)),
    Codec("int8", _WHOLE, scaled, ("int8",)),
    Codec("MXFP4", ("_blocks", "_scales"), mxfp4, ("uint8", "uint8")),
    Codec(
        "asymmetric int{bits}", (*_PACKED, _ZERO), with_zeros, ("int32", "", "int8"), others=_SHAPE
    ),
    Codec(
        "asymmetric int{bits}",
        (*_PACKED, _ZERO),
        with_packed_zeros,
        ("int32", "", "int32"),
        others=_SHAPE,
    ),
    Codec("int{bits}", _PACKED, packed_integers, ("int32",), others=_SHAPE),
)
