"""Tiny Hugging Face checkpoints of every architecture, made without torch.

The test suite converts them with maxconv and `tests/maxtext` converts the very same bytes with
MaxText, so every value is a pure function of the tensor's name: no random number generator whose
stream might change between library versions is involved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
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

# Shapes by name; a size is a key of `config.json`, or "queries" or "keys" (see Architecture).
Tensors = dict[str, tuple[str, ...]]

_ATTENTION: Tensors = {
    "self_attn.k_proj.weight": ("keys", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "queries"),
    "self_attn.q_proj.weight": ("queries", "hidden_size"),
    "self_attn.v_proj.weight": ("keys", "hidden_size"),
}
_ATTENTION_BIASES: Tensors = {
    "self_attn.k_proj.bias": ("keys",),
    "self_attn.v_proj.bias": ("keys",),
    "self_attn.q_proj.bias": ("queries",),
}
_HEAD_NORMS: Tensors = {
    "self_attn.k_norm.weight": ("head_dim",),
    "self_attn.q_norm.weight": ("head_dim",),
}
_PROJECTION_NORMS: Tensors = {
    "self_attn.k_norm.weight": ("keys",),
    "self_attn.q_norm.weight": ("queries",),
}
_MLP: Tensors = {
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
}
_QWEN_EXPERTS: Tensors = {
    "mlp.experts.{expert}.down_proj.weight": ("hidden_size", "moe_intermediate_size"),
    "mlp.experts.{expert}.gate_proj.weight": ("moe_intermediate_size", "hidden_size"),
    "mlp.experts.{expert}.up_proj.weight": ("moe_intermediate_size", "hidden_size"),
    "mlp.gate.weight": ("num_experts", "hidden_size"),
}
_MIXTRAL_EXPERTS: Tensors = {
    "block_sparse_moe.experts.{expert}.w1.weight": ("intermediate_size", "hidden_size"),
    "block_sparse_moe.experts.{expert}.w2.weight": ("hidden_size", "intermediate_size"),
    "block_sparse_moe.experts.{expert}.w3.weight": ("intermediate_size", "hidden_size"),
    "block_sparse_moe.gate.weight": ("num_local_experts", "hidden_size"),
}


def _norms(*names: str) -> Tensors:
    return {f"{name}_layernorm.weight": ("hidden_size",) for name in names}


_DENSE_LAYER = (
    {"input_layernorm.weight": ("hidden_size",)} | _MLP | _norms("post_attention") | _ATTENTION
)

_DENSE_WORDS = {
    "base_emb_dim": "hidden_size",
    "base_num_query_heads": "num_attention_heads",
    "base_num_kv_heads": "num_key_value_heads",
    "base_mlp_dim": "intermediate_size",
    "base_num_decoder_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True)
class Architecture:
    """What the checkpoints of a Hugging Face architecture hold, and how MaxText says it.

    Attributes:
        layer: the tensors of a layer. Sizes are keys of `config.json`, or "queries" and "keys" for
            the rows of the attention's projections. "{expert}" stands for each expert's number.
        words: MaxText's config words and the keys of `config.json` with their values.
        experts: the key of `config.json` that counts the experts of a layer.
        block: how many layers `base_num_decoder_layers` counts as one.
    """

    layer: Tensors
    words: Mapping[str, str] = field(default_factory=lambda: _DENSE_WORDS)
    experts: str | None = None
    block: int = 1


ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": Architecture(_DENSE_LAYER),
    "MistralForCausalLM": Architecture(_DENSE_LAYER),
    "Qwen2ForCausalLM": Architecture(_DENSE_LAYER | _ATTENTION_BIASES),
    "Qwen3ForCausalLM": Architecture(_DENSE_LAYER | _HEAD_NORMS),
    "Qwen3MoeForCausalLM": Architecture(
        _norms("input", "post_attention") | _QWEN_EXPERTS | _ATTENTION | _HEAD_NORMS,
        # MaxText wants both widths equal where every layer has experts.
        _DENSE_WORDS
        | {
            "base_mlp_dim": "moe_intermediate_size",
            "base_moe_mlp_dim": "moe_intermediate_size",
            "num_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
        },
        experts="num_experts",
    ),
    "MixtralForCausalLM": Architecture(
        _MIXTRAL_EXPERTS | _norms("input", "post_attention") | _ATTENTION,
        _DENSE_WORDS
        | {
            "base_moe_mlp_dim": "intermediate_size",
            "num_experts": "num_local_experts",
            "num_experts_per_tok": "num_experts_per_tok",
        },
        experts="num_local_experts",
    ),
    "Olmo3ForCausalLM": Architecture(
        _MLP | _norms("post_attention", "post_feedforward") | _ATTENTION | _PROJECTION_NORMS
    ),
    "Gemma2ForCausalLM": Architecture(
        _MLP
        | _norms("input", "post_attention", "post_feedforward", "pre_feedforward")
        | _ATTENTION,
        block=2,
    ),
}


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

    @property
    def architecture(self) -> Architecture:
        return ARCHITECTURES[self.config["architectures"][0]]


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

_QWEN3_MOE = _QWEN3 | {
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "moe_intermediate_size": 26,
    "norm_topk_prob": True,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
    "rope_theta": 10000000.0,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
_MIXTRAL = _MISTRAL | {
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 5,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
}
_OLMO3 = {
    "model_type": "olmo3",
    "attention_bias": False,
    # MaxText scans over cycles of four layers, so this is two of them.
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2,
    "num_hidden_layers": 8,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "yarn",
    },
    "rope_theta": 500000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0",
}
_GEMMA2 = {
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    # MaxText's layers are pairs of these: one of local, one of global attention.
    "num_hidden_layers": 4,
    "num_key_value_heads": 3,
    "query_pre_attn_scalar": 10,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

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
    "qwen3-30b-a3b": _case("qwen3-30b-a3b", "Qwen3MoeForCausalLM", **_QWEN3_MOE),
    "mixtral-8x7b": _case("mixtral-8x7b", "MixtralForCausalLM", **_MIXTRAL),
    "olmo3-7b": _case("olmo3-7b", "Olmo3ForCausalLM", **_OLMO3),
    "gemma2-2b": _case("gemma2-2b", "Gemma2ForCausalLM", overrides={"vocab_size": 288}, **_GEMMA2),
}


def tensors(case: str) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a case's checkpoint, in the order of its shards."""
    config, architecture = CASES[case].config, CASES[case].architecture
    sizes = dict(config) | {
        "queries": config["num_attention_heads"] * config["head_dim"],
        "keys": config["num_key_value_heads"] * config["head_dim"],
    }
    experts = range(config[architecture.experts]) if architecture.experts else range(1)

    named: Tensors = {"model.embed_tokens.weight": ("vocab_size", "hidden_size")}
    for i in range(config["num_hidden_layers"]):
        for name, shape in architecture.layer.items():
            names = (f"model.layers.{i}.{name.format(expert=expert)}" for expert in experts)
            named |= dict.fromkeys(names, shape)
    named["model.norm.weight"] = ("hidden_size",)
    if not config["tie_word_embeddings"]:
        named["lm_head.weight"] = ("vocab_size", "hidden_size")
    return {name: tuple(sizes[size] for size in shape) for name, shape in named.items()}


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
    config, architecture = CASES[case].config, CASES[case].architecture
    words = {"model_name": CASES[case].model_name, "override_model_config": True}
    words |= {word: config[key] for word, key in architecture.words.items()}
    words["base_num_decoder_layers"] //= architecture.block
    words["scan_layers"] = scan_layers
    words |= CASES[case].overrides
    words |= overrides
    return [f"{key}={value}" for key, value in words.items()]


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
