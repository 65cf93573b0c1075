"""Tiny Hugging Face checkpoints of every architecture, made without torch.

`data/tiny` says what they hold: sizes pairwise different, also as products, so that no wrong axis
or transpose can pass unseen. The test suite converts them with maxconv and `tests/maxtext` converts
the very same bytes with MaxText, so every value is a pure function of the tensor's name: no random
number generator whose stream might change between library versions is involved.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import shapes
from safetensors.numpy import save_file

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
}


@dataclass(frozen=True)
class Case:
    """A checkpoint to convert, and the MaxText model it becomes.

    Attributes:
        model_name: MaxText's name of the model.
        words: MaxText's config words that differ from that model's.
        config: the checkpoint's `config.json`.
        tensors: shapes of all tensors, in the order of the shards; before a shape, the dtype that
            a tensor has in any case.
        scans: MaxText can stack the layers of such a model.
        save_dtypes: in which MaxText's conversion is right.
        converts: MaxText's converter knows such a model at all.
    """

    model_name: str
    words: Mapping[str, Any]
    config: Mapping[str, Any]
    tensors: Mapping[str, list[Any]]
    scans: bool = True
    save_dtypes: tuple[str, ...] = ("bfloat16", "float32")
    converts: bool = True

    @property
    def is_packed(self) -> bool:
        """Weights are dequantised: MaxText's converter can't do that, nor is there a way back."""
        return "quantization_config" in self.config and "float8_e4m3fn" not in self.save_dtypes


CASES: dict[str, Case] = {
    path.stem: Case(**shapes.load(path)) for path in sorted((shapes.DATA / "tiny").glob("*.json"))
}

# Sizes that meshes of eight devices divide, so that all processes have the same to do.
EVEN: dict[str, Case] = {
    path.stem: Case(**shapes.load(path)) for path in sorted((shapes.DATA / "even").glob("*.json"))
}

# Each case with its layers scanned, and not.
LAYERS = [
    (name, scan)
    for name, case in CASES.items()
    for scan in (True, False)
    if not case.is_packed and (case.scans or not scan)
]


# What LoRA adapters adapt: patterns of the names of modules.
ADAPTERS = {
    "attention": r"self_attn\.[qkvo]_proj",
    "linear": r".*_proj",
    "language": r"language_model\..*_proj",
    "some": r"model\.layers\.[02]\.(self_attn\.q_proj|mlp\.down_proj)",
    "router": r".*\.mlp\.gate",
    "experts": r".*\.w[123]",
    "vision": r".*\.attn\.(qkv|proj)",
}
RANK = 4


def tensors(case: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a case's checkpoint, in the order of its shards."""
    return {name: shapes.split(shape)[1] for name, shape in CASES[case].tensors.items()}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Reproducible float32 values: weights are nonzero in (-1, 1), norms lie in (0.5, 1.5).

    Each weight is put together from random bits: the sign, three bits of exponent (2**-8 to
    2**-1) and all 23 bits of mantissa, so that rounding to a narrower type matters.
    """
    count = int(np.prod(shape))
    bits = np.frombuffer(hashlib.shake_256(name.encode()).digest(4 * count), "<u4")
    sign = bits & np.uint32(1 << 31)
    exponent = np.uint32(119) + (bits >> np.uint32(23) & np.uint32(7))
    mantissa = bits & np.uint32((1 << 23) - 1)
    weight = (sign | exponent << np.uint32(23) | mantissa).view("<f4").astype(np.float32)
    if name.endswith("norm.weight"):
        weight = np.float32(0.5) + np.abs(weight)
    return weight.reshape(shape)


def write(
    case: str | Case,
    directory: str | Path,
    dtype: str = "bfloat16",
    shard_bytes: int | None = 40_000,
) -> Path:
    """Writes a case's checkpoint as Hugging Face publishes it, and returns its directory.

    `shard_bytes` bounds the size of a shard; None gives a single `model.safetensors`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    case = CASES[case] if isinstance(case, str) else case
    config = dict(case.config) | {"torch_dtype": dtype}
    _write_json(directory / "config.json", config)

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, stated in case.tensors.items():
        own, shape = shapes.split(stated)
        tensor = values(name, shape)
        if own is not None and own.kind in "iu":  # numbers of experts, say, or packed weights
            tensor = tensor.view(np.uint32) % (1 << 8 if own.kind == "u" else 251)
        if name.endswith("_scales"):  # exponents, as of other weights: 2**-8 to 2**-1
            tensor = 119 + tensor % 8
        tensor = tensor.astype(own or DTYPES[dtype])
        used = sum(other.nbytes for other in shards[-1].values())
        if shard_bytes is not None and used and used + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor

    if shard_bytes is None:
        save_file(shards[0], directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)
    return directory


def write_adapter(case: str, adapter: str, directory: str | Path, dtype: str = "float32") -> Path:
    """Writes a LoRA adapter of a case's model as PEFT saves it, and returns its directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "bias": "none"}
    _write_json(directory / "adapter_config.json", config)
    parts = {}
    for name, shape in tensors(case).items():
        module = name.removesuffix(".weight")
        if len(shape) != 2 or not re.search(f"^(.*\\.)?({ADAPTERS[adapter]})$", module):
            continue
        for letter, part in (("A", (RANK, shape[1])), ("B", (shape[0], RANK))):
            of = f"base_model.model.{module}.lora_{letter}.weight"
            parts[of] = values(of, part).astype(DTYPES[dtype])
    save_file(parts, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


def maxtext_words(case: str | Case, scan_layers: bool, **overrides: Any) -> list[str]:
    """The `key=value` words that make MaxText, and maxconv, convert a case's checkpoint."""
    case = CASES[case] if isinstance(case, str) else case
    words = {"model_name": case.model_name, "override_model_config": True}
    words |= dict(case.words) | {"scan_layers": scan_layers} | overrides
    return [f"{key}={value}" for key, value in words.items()]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
