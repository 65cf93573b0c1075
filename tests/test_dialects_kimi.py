"""Kimi K2 as it is published: block fp8, int4 experts, and the decoder of K2.5, against numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from dialects import BF16, Checkpoint, same
from test_dialects_quantised import FP8, Scheme, packed, scaled

GROUP = 32  # numbers that share a scale, as in Kimi K2 Thinking
# Sizes that groups and words of eight numbers divide.
WORDS = {"base_emb_dim": 64, "base_moe_mlp_dim": 32}
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
INT4_CONFIG = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": GROUP, "strategy": "group", "symmetric": True},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up)_proj"],
}


def even() -> tiny.Case:
    """The tiny Kimi K2, wider."""
    case = tiny.CASES["kimi-k2-1t"]
    wider = {42: WORDS["base_emb_dim"], 34: WORDS["base_moe_mlp_dim"]}
    tensors = {n: [wider.get(size, size) for size in shape] for n, shape in case.tensors.items()}
    config = {
        **case.config,
        "model_type": "kimi_k2",
        "hidden_size": 64,
        "moe_intermediate_size": 32,
    }
    return tiny.Case(case.model_name, {**case.words, **WORDS}, config, tensors)


def fp8(random: np.random.Generator, x: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A scale for each block, by the name that DeepSeek gave it."""
    parts, value = scaled(FP8, "blocks", np.float32)(random, x)
    return {"": parts[""], "_scale_inv": parts["_scale"]}, value


def quantised(
    tensors: dict[str, np.ndarray], scheme: Scheme, of: str
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The tensors as stored, and what they stand for; those whose names hold `of` are quantised."""
    random, stored, plain = np.random.default_rng(0), dict(tensors), dict(tensors)
    for name, x in tensors.items():
        if of in name and "_proj" in name:
            parts, value = scheme(random, stored.pop(name))
            stored |= {name + end: part for end, part in parts.items()}
            plain[name] = value.astype(BF16)
            assert plain[name].shape == x.shape
    return stored, plain


def k25(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The names of Kimi K2.5, and parts of it that see."""
    seeing = {
        "vision_tower.patch_embed.proj.weight": np.ones((8, 3, 14, 14), BF16),
        "vision_tower.encoder.blocks.0.wqkv.weight": np.ones((24, 8), BF16),
        "mm_projector.proj.0.weight": np.ones((32, 32), BF16),
    }
    return {f"language_model.{name}": x for name, x in tensors.items()} | seeing


@pytest.mark.parametrize("scheme", [pytest.param("fp8", marks=pytest.mark.slow), "int4"])
def test_kimi_k2_as_published(scheme: str, tmp_path: Path) -> None:
    c = Checkpoint(even(), tmp_path)
    one, of = (fp8, "_proj") if scheme == "fp8" else (packed(4, GROUP), ".experts.")
    stored, plain = quantised(c.tensors, one, of)
    c.save(plain)
    want, _ = c.converted()
    c.save(stored)
    entries: dict[str, Any] = {
        "quantization_config": FP8_CONFIG if scheme == "fp8" else INT4_CONFIG
    }
    c.entries(**entries)
    leaves, notices = c.converted()
    same(leaves, want)
    assert any("are dequantised from" in notice for notice in notices)
    c.save(k25(stored))
    text = {**c.case.config, **entries, "architectures": ["DeepseekV3ForCausalLM"]}
    c.entries(**dict.fromkeys((*text, "quantization_config")))
    c.entries(
        architectures=["KimiK25ForConditionalGeneration"],
        model_type="kimi_k25",
        tie_word_embeddings=False,
        text_config=text,
        vision_config={"vt_hidden_size": 8},
    )
    leaves, notices = c.converted()
    same(leaves, want)
    assert any("are dequantised from" in notice for notice in notices)
    assert any("vision_tower" in notice for notice in notices), notices
