"""Weights as programs that quantise leave them: each kind over several families, against numpy."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from dialects import BF16, FP8, Checkpoint, same

Scheme = Callable[[np.random.Generator, np.ndarray], tuple[dict[str, np.ndarray], np.ndarray]]


def scaled(kind: np.dtype, shape: str, dtype: Any, zeros: bool = False) -> Scheme:
    """A scale, and perhaps a zero, for each of the places that `shape` names."""

    def one(random: np.random.Generator, x: np.ndarray) -> tuple[dict, np.ndarray]:
        rows, columns = x.shape
        blocks = (-(-rows // 16), -(-columns // 32))
        shapes = {"rows": (rows,), "rows 1": (rows, 1), "1": (1,), "blocks": blocks}
        scale = random.uniform(0.01, 1, shapes[shape]).astype(dtype)
        wide = scale.astype(np.float32)
        if shape == "blocks":
            wide = np.repeat(np.repeat(wide, 16, 0), 32, 1)[:rows, :columns]
        wide = wide[:, None] if shape == "rows" else wide
        numbers = random.integers(-120, 120, x.shape).astype(kind)
        zero = random.integers(-9, 9, scale.shape).astype(np.int8)
        parts = {"": numbers, "_scale": scale} | ({"_zero_point": zero} if zeros else {})
        off = zero.astype(np.float32) if zeros else np.float32(0)
        return parts, (numbers.astype(np.float32) - off) * wide

    return one


def packed(bits: int, group: int | None, zeros: str = "") -> Scheme:
    """Numbers packed along rows; zeros "packed" along columns, or as "int8"."""

    def pack(numbers: np.ndarray) -> np.ndarray:
        each = (numbers + (1 << bits - 1)).astype(np.uint32)
        each = np.pad(each, ((0, 0), (0, -each.shape[1] % (32 // bits))))
        each = each.reshape(len(each), -1, 32 // bits)
        shifts = np.arange(0, 32, bits, dtype=np.uint32)
        return np.bitwise_or.reduce(each << shifts, axis=-1).view(np.int32)

    def one(random: np.random.Generator, x: np.ndarray) -> tuple[dict, np.ndarray]:
        n = group or x.shape[1]
        scale = random.uniform(0.01, 1, (len(x), x.shape[1] // n)).astype(BF16)
        half = 1 << bits - 1
        numbers = random.integers(-half, half, x.shape)
        zero = random.integers(-half, half, scale.shape) * bool(zeros)
        parts = {"_packed": pack(numbers), "_scale": scale, "_shape": np.array(x.shape)}
        if zeros:
            kept = pack(zero.T).T if zeros == "packed" else zero.astype(np.int8)
            parts["_zero_point"] = kept
        off, wide = (np.repeat(y.astype(np.float32), n, 1) for y in (zero, scale))
        return parts, (numbers.astype(np.float32) - off) * wide

    return one


INT8 = np.dtype(np.int8)
SCHEMES: Mapping[str, tuple[Scheme, str]] = {
    "fp8 rows": (scaled(FP8, "rows 1", np.float32), "fp8 with weight_scale"),
    "fp8 vector": (scaled(FP8, "rows", BF16), "fp8 with weight_scale"),
    "fp8 blocks": (scaled(FP8, "blocks", np.float32), "fp8 with weight_scale"),
    "int8 rows": (scaled(INT8, "rows 1", BF16), "int8"),
    "int8 whole": (scaled(INT8, "1", np.float32), "int8"),
    "int8 zeros": (scaled(INT8, "rows 1", np.float32, zeros=True), "asymmetric int8"),
    "4 groups": (packed(4, 16), "int4"),
    "4 groups zeros": (packed(4, 16, "packed"), "asymmetric int4"),
    "4 groups zeros int8": (packed(4, 16, "int8"), "asymmetric int4"),
    "4 rows zeros": (packed(4, None, "packed"), "asymmetric int4"),
    "8 groups": (packed(8, 16), "int8"),
    "8 rows zeros": (packed(8, None, "packed"), "asymmetric int8"),
}


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_of_compressed_tensors(case: str, scheme: str, tmp_path: Path) -> None:
    c = Checkpoint(tiny.EVEN[case], tmp_path)
    one, said = SCHEMES[scheme]
    random = np.random.default_rng(0)
    stored, plain = {}, {}
    for name, x in c.tensors.items():
        if not name.endswith("_proj.weight"):
            stored[name] = plain[name] = x
            continue
        parts, value = one(random, x)
        stored |= {name + end: part for end, part in parts.items()}
        plain[name] = value.astype(BF16)
    c.save(plain)
    want, _ = c.converted()
    c.save(stored)
    bits = int(scheme[0]) if scheme[0].isdigit() else 8
    weights = {"num_bits": bits, "block_structure": [16, 32]}
    c.entries(
        quantization_config={
            "quant_method": "compressed-tensors",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    )
    leaves, notices = c.converted()
    same(leaves, want)
    count = len(plain) - len([n for n in plain if n in stored and n + "_scale" not in stored])
    assert f"{count} tensors are dequantised from {said}" in notices


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen3-30b-a3b"])
def test_zeros_of_another_shape_are_named(case: str, tmp_path: Path) -> None:
    c = Checkpoint(tiny.EVEN[case], tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    parts, _ = packed(4, 16, "packed")(np.random.default_rng(0), c.tensors.pop(name))
    stored = {name + end: part for end, part in parts.items()}
    for zero in (stored[f"{name}_scale"].astype(np.int32), stored[f"{name}_zero_point"] * 1.0):
        c.save({**c.tensors, **stored, f"{name}_zero_point": zero})
        problem = c.refused()
        assert f"{name}_zero_point" in problem and "\n" not in problem


@pytest.mark.parametrize("case", ["llama3.1-8b", "mistral-7b", "mixtral-8x7b"])
@pytest.mark.parametrize("end", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_fp8_with_a_scale_for_each_tensor(
    case: str, end: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    c = Checkpoint(case, tmp_path)
    stored, plain = {}, {}
    for i, (name, x) in enumerate(c.tensors.items()):
        stored[name] = plain[name] = x
        if x.ndim == 2 and ".layers." in name and "gate.weight" not in name:
            scale = np.float32(0.25 + i / 64)
            packed = (x.astype(np.float32) / scale).astype(FP8)
            stored |= {name: packed, name + end: np.full(shape, scale, np.float32)}
            stored[name.replace(".weight", ".activation_scale")] = np.float32(1).reshape(())
            plain[name] = (packed.astype(np.float32) * scale).astype(BF16)
    c.save(plain)
    want, _ = c.converted()
    c.save(stored)
    c.entries(quantization_config={"quant_method": "fp8", "activation_scheme": "static"})
    same(c.converted()[0], want)


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen3-8b"])
@pytest.mark.parametrize(
    ("method", "stored", "said"),
    [
        ("gptq", {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}, "GPTQ"),
        ("awq", {"qweight": np.int32, "qzeros": np.int32, "scales": np.float16}, "AWQ"),
        ("bitsandbytes", {"weight": np.int8, "SCB": np.float32}, "bitsandbytes"),
        ("modelopt", {"weight": np.uint8, "weight_scale_2": np.float32}, "NVFP4"),
        ("compressed-tensors", {"weight": FP8, "weight_global_scale": np.float32}, "NVFP4"),
        ("mxfp4", {"weight_packed": np.uint8, "weight_scale": np.uint8}, "mxfp4 with weight_pa"),
        ("hqq", {"W_q": np.uint8}, "HQQ"),
        ("torchao", {"_weight_qdata": np.int8}, "torchao"),
        (
            "bitnet",
            {"weight": np.uint8, "weight_scale": np.float32},
            "with weights of uint8",
        ),
        ("compressed-tensors", {"weight_g_idx": np.int32}, "g_idx"),
    ],
)
def test_quantised_in_a_way_that_is_not_read(
    case: str, method: str, stored: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    c = Checkpoint(case, tmp_path)
    at = "model.layers.0.mlp.up_proj."
    others = {n: x for n, x in c.tensors.items() if not n.startswith(at)}
    c.save(others | {at + end: np.ones((4, 2)).astype(dtype) for end, dtype in stored.items()})
    c.entries(quantization_config={"quant_method": method})
    problem = c.refused()
    assert said in problem and "which is not read" in problem and "\n" not in problem
    c.save()  # weights that were dequantised, and an entry that was left
    c.converted()
