"""Tiny Hugging Face checkpoints of every dense architecture, made without torch.

The test suite converts them with maxconv and `tests/maxtext` converts the very same bytes with
MaxText, so every value is a pure function of the tensor's name: no random number generator whose
stream might change between library versions is involved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}

# Pairwise different sizes (also as products), so that no wrong axis or transpose can pass unseen.
_DIMS = {
    "hidden_size": 42,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "vocab_size": 259,
}

# A hidden size that 16 divides: MaxText's default 16 simulated devices really shard such leaves.
_DIVISIBLE_DIMS = _DIMS | {"hidden_size": 48, "intermediate_size": 64}


@dataclass(frozen=True)
class Case:
    """A checkpoint to convert, and the MaxText model it becomes.

    Attributes:
        model_name: MaxText's name of the model.
        config: the checkpoint's `config.json`.
        overrides: MaxText config words that differ from what `config` says.
    """

    model_name: str
    config: Mapping[str, Any]
    overrides: Mapping[str, int]


def _case(
    model_name: str,
    architecture: str,
    *,
    dims: dict[str, int] = _DIMS,
    overrides: Mapping[str, int] | None = None,
    **config: Any,
) -> Case:
    common = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 4096,
        "transformers_version": "4.51.0",
        "use_cache": True,
    }
    return Case(model_name, common | dims | config, overrides or {})


_LLAMA = {
    "model_type": "llama",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
_MISTRAL = {
    "model_type": "mistral",
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}
_QWEN2 = {
    "model_type": "qwen2",
    "max_window_layers": 3,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "use_sliding_window": False,
}
_QWEN3 = _QWEN2 | {"model_type": "qwen3", "attention_bias": False, "rope_scaling": None}

CASES: dict[str, Case] = {
    "llama3.1-8b": _case("llama3.1-8b", "LlamaForCausalLM", **_LLAMA),
    "mistral-7b": _case("mistral-7b", "MistralForCausalLM", dims=_DIVISIBLE_DIMS, **_MISTRAL),
    "qwen2.5-1.5b": _case("qwen2.5-1.5b", "Qwen2ForCausalLM", **_QWEN2, tie_word_embeddings=True),
    "qwen2.5-7b": _case("qwen2.5-7b", "Qwen2ForCausalLM", **_QWEN2, tie_word_embeddings=False),
    "qwen3-0.6b": _case("qwen3-0.6b", "Qwen3ForCausalLM", **_QWEN3, tie_word_embeddings=True),
    "qwen3-8b": _case(
        "qwen3-8b", "Qwen3ForCausalLM", dims=_DIVISIBLE_DIMS, **_QWEN3, tie_word_embeddings=False
    ),
    # MaxText may hold more vocabulary rows than the checkpoint; it pads them with zeros.
    "qwen3-0.6b+pad": _case(
        "qwen3-0.6b",
        "Qwen3ForCausalLM",
        overrides={"vocab_size": 288},
        **_QWEN3,
        tie_word_embeddings=True,
    ),
}


def tensors(case: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a case's checkpoint, in the order Hugging Face writes them."""
    config = CASES[case].config
    hidden, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim

    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "mlp.down_proj.weight": (hidden, mlp),
        "mlp.gate_proj.weight": (mlp, hidden),
        "mlp.up_proj.weight": (mlp, hidden),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
    }
    if config["model_type"] == "qwen2":
        layer |= {f"self_attn.{name}_proj.bias": (keys,) for name in "kv"}
        layer |= {"self_attn.q_proj.bias": (queries,)}
    if config["model_type"] == "qwen3":
        layer |= {f"self_attn.{name}_norm.weight": (head_dim,) for name in "kq"}

    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


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
    case: str,
    directory: str | Path,
    dtype: str = "bfloat16",
    shard_bytes: int | None = 40_000,
) -> Path:
    """Writes a case's checkpoint as Hugging Face publishes it, and returns its directory.

    `shard_bytes` bounds the size of a shard; None gives a single `model.safetensors`.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(CASES[case].config) | {"torch_dtype": dtype}
    _write_json(directory / "config.json", config)

    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in tensors(case).items():
        tensor = values(name, shape).astype(DTYPES[dtype])
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


def maxtext_words(case: str, scan_layers: bool, **overrides: Any) -> list[str]:
    """The `key=value` words that make MaxText, and maxconv, convert a case's checkpoint."""
    config = CASES[case].config
    words = {
        "model_name": CASES[case].model_name,
        "override_model_config": True,
        "base_emb_dim": config["hidden_size"],
        "base_num_query_heads": config["num_attention_heads"],
        "base_num_kv_heads": config["num_key_value_heads"],
        "base_mlp_dim": config["intermediate_size"],
        "base_num_decoder_layers": config["num_hidden_layers"],
        "head_dim": config["head_dim"],
        "vocab_size": config["vocab_size"],
        "scan_layers": scan_layers,
    }
    words |= CASES[case].overrides
    words |= overrides
    return [f"{key}={value}" for key, value in words.items()]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
