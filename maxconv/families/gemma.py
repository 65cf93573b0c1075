"""Gemma 1, 2 and 3. transformers modeling_gemma.py, modeling_gemma2.py, modeling_gemma3.py; MaxText
models/gemma.py, models/gemma2.py, models/gemma3.py.

MaxText's norms multiply by their scale, transformers' by 1 + scale; so 1 is added to these scales,
in float32. MaxText does not scale embeddings when they are looked up, so the table is scaled.
"""

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from maxconv.algebra import scale, shift
from maxconv.families import rope
from maxconv.families.blocks import (
    Ops,
    attention,
    ends,
    gated_mlp,
    norm,
    qk_norms,
    query_scale,
)
from maxconv.families.dims import Dims, size
from maxconv.families.rope import FULL, SLIDING
from maxconv.families.settings import (
    NOT_BIDIRECTIONAL,
    SOFT_CAPS,
    Computation,
    Fixed,
    activation,
    epsilon,
    layer_kinds,
    window,
)
from maxconv.families.table import Family, cycle, each, pairs, uniform
from maxconv.families.vision import VisionDims, siglip

PLUS_ONE = (shift(1),)
CYCLE = 6  # of Gemma 3: five layers of sliding attention, then one of full attention


def gemma_rows(d: Dims):
    yield from gemma_ends(d)
    before = (
        norm("pre_self_attention_norm", "input_layernorm", d.emb, PLUS_ONE, "float32"),
        norm("pre_ffw_norm", "post_attention_layernorm", d.emb, PLUS_ONE, "float32"),
    )
    attn = attention(d, query=(query_scale(d.head_dim),))
    yield from each(uniform(d.layers), before, attn, gated_mlp(d))


def gemma_ends(d: Dims):
    table = scale(float(np.float32(math.sqrt(d.emb))))
    return ends(d, embedding=(table,), norm=PLUS_ONE, norm_dtype="float32")


def gemma2_rows(d: Dims):
    yield from gemma_ends(d)
    for kind, layers in zip(("local", "global"), pairs(d.layers), strict=True):
        attn = attention(d, query=(query_scale(d.head_dim),), at=f"self_attention_{kind}")
        four = norms(d, f"_{kind}", PLUS_ONE, "float32")
        yield from each(layers, four, attn, gated_mlp(d, at=f"mlp_{kind}"))


def norms(d: Dims, suffix: str = "", ops: Ops = (), dtype: str | None = None):
    """The norms before and after attention and MLP."""
    for path, name in (
        ("pre_self_attention_norm", "input_layernorm"),
        ("post_self_attention_norm", "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ):
        yield norm(f"{path}{suffix}", name, d.emb, ops, dtype)


@dataclass(frozen=True, kw_only=True)
class Gemma3Dims(VisionDims):
    """Published config files leave out values that are defaults of Gemma3TextConfig."""

    heads: int = size("num_attention_heads", maxtext="base_num_query_heads", default=8)
    kv_heads: int = size("num_key_value_heads", maxtext="base_num_kv_heads", default=4)
    head_dim: int = size("head_dim", maxtext="head_dim", default=256)
    vocab: int = size("vocab_size", maxtext="vocab_size", default=262_208)
    vit_image: int = size("vision_config.image_size", maxtext="image_size_for_vit", default=224)


def gemma3_rows(d: Gemma3Dims):
    table = scale(float(ml_dtypes.bfloat16(math.sqrt(d.emb))))
    yield from ends(d, embedding=(table,), norm=PLUS_ONE, norm_dtype="float32")
    for layers in cycle(d.layers, CYCLE):
        qk = qk_norms(d, PLUS_ONE, "float32")
        four = norms(d, ops=PLUS_ONE, dtype="float32")
        yield from each(layers, four, attention(d), qk, gated_mlp(d))
    if d.multimodal:
        yield from siglip(d, (d.vit_image // d.vit_patch) ** 2, PLUS_ONE, "float32")


def gemma3_query(d: Gemma3Dims, name: str) -> int:
    """What MaxText divides queries by the root of, under a model_name."""
    return d.emb // d.heads if name == "gemma3-27b" else d.head_dim


TANH = "gelu_pytorch_tanh"

EPSILON = Fixed(("rms_norm_eps",), 1e-6, lambda d, name: 1e-6)  # of the norms in layers

GEMMA = Family(
    architectures=("GemmaForCausalLM",),
    model_types=("gemma",),
    ties=True,
    decoder_block="gemma",
    rows=gemma_rows,
    computes=Computation(
        settings=(epsilon(), activation(TANH, {"gelu": TANH, None: TANH})),  # it was published so
        fixed=(EPSILON, NOT_BIDIRECTIONAL),
        scaled_table=True,
    ),
    pads_vocab=True,
)
GEMMA2 = Family(
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    ties=True,
    decoder_block="gemma2",
    rows=gemma2_rows,
    computes=Computation(
        settings=(epsilon(), activation(TANH), window(4096), *SOFT_CAPS),
        fixed=(
            Fixed(("query_pre_attn_scalar",), 256, lambda d, name: d.head_dim),
            EPSILON,
            layer_kinds(lambda d, name: 2),
            NOT_BIDIRECTIONAL,
        ),
        rope=rope.theta_alone,
        has_sliding=True,
        scaled_table=True,
    ),
    pads_vocab=True,
    layers_per_block=2,
)
GEMMA3 = Family(
    architectures=("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    model_types=("gemma3", "gemma3_text"),
    ties=True,
    spare_rows=64,
    decoder_block="gemma3",
    rows=gemma3_rows,
    computes=Computation(
        settings=(epsilon(), activation(TANH), window(4096), *SOFT_CAPS),
        fixed=(
            Fixed(("query_pre_attn_scalar",), 256, gemma3_query),
            EPSILON,
            Fixed(("sliding_window_pattern", "_sliding_window_pattern"), 6, lambda d, name: CYCLE),
            layer_kinds(lambda d, name: CYCLE),
            NOT_BIDIRECTIONAL,
        ),
        bases={FULL: 1_000_000.0, SLIDING: 10_000.0},
        rope=rope.gemma3,
        split=True,
        has_sliding=True,
        scaled_table=True,
    ),
    sizes=Gemma3Dims,
    names=(
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("model.language_model.", "model."),
        ("model.vision_tower.vision_model.", "vision_tower."),
        ("model.vision_tower.", "vision_tower."),
        ("vision_tower.vision_model.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    in_memory=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.vision_model.", "model.vision_tower."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
        ("model.vision_tower.vision_model.", "model.vision_tower."),
    ),
    encoders=("vision_tower.*", "multi_modal_projector.*"),
    pads_vocab=True,
)
