"""Gemma 4: dense, MoE, and the small models with per-layer embeddings. transformers
modeling_gemma4.py; MaxText models/gemma4.py, gemma4_small.py, gemma4_vision.py.

Norms are as in the checkpoint; the embedding table is scaled as for Gemma 2. Layers with full
attention have a head size of their own, and may use their keys as values. In the small models, the
last layers use the keys and values of earlier layers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from maxconv.algebra import hf, rearrange, scale
from maxconv.families import rope
from maxconv.families.blocks import LAYER, attention, ends, fused_kernels, gated_mlp, norm, qk_norms
from maxconv.families.dims import MOST_LAYERS, Dims, size
from maxconv.families.gemma import norms
from maxconv.families.rope import FULL, SLIDING
from maxconv.families.settings import (
    SOFT_CAPS,
    Computation,
    Setting,
    activation,
    epsilon,
    layer_kinds,
    window,
)
from maxconv.families.table import Family, Layers, Numbers, Row, each, row
from maxconv.families.vision import VisionDims, gemma4_vit

BLOCK = 6  # five layers of sliding attention, then one of full attention


@dataclass(frozen=True, kw_only=True)
class Gemma4Dims(VisionDims):
    """`full_*`: sizes of layers with full attention. Some config files give the width of experts
    without having any."""

    moe_mlp: int = size("moe_intermediate_size", default=-1)
    head_dim: int = size("head_dim", maxtext="head_dim", default=256)
    full_head_dim: int = size(
        "per_layer_config.full_attention.head_dim",
        "global_head_dim",
        maxtext="global_head_dim",
        default=512,
    )
    full_kv_heads: int = size(
        "per_layer_config.full_attention.num_key_value_heads",
        "num_global_key_value_heads",
        maxtext="global_num_kv_heads",
        default=lambda d: d["kv_heads"],
    )
    keys_are_values: bool = size("attention_k_eq_v", default=False)
    vit_positions: int = size(
        "vision_config.position_embedding_size",
        maxtext="num_position_embeddings_for_vit",
        default=10_240,
    )

    @property
    def full(self) -> Dims:
        return replace(self, head_dim=self.full_head_dim, kv_heads=self.full_kv_heads)


@dataclass(frozen=True, kw_only=True)
class SmallDims(Gemma4Dims):
    """`per_layer` is the width of the embeddings for each layer."""

    full_kv_heads: int = size(default=lambda d: d["kv_heads"])
    kinds: list = size("layer_types", each="layers")
    shared: int = size(
        "num_kv_shared_layers", maxtext="num_kv_shared_layers", most=MOST_LAYERS, below="layers"
    )
    wide: bool = size("use_double_wide_mlp", maxtext="use_double_wide_mlp", default=False)
    per_layer: int = size(
        "hidden_size_per_layer_input", maxtext="hidden_size_per_layer_input", default=256
    )
    per_layer_vocab: int = size(
        "vocab_size_per_layer_input", maxtext="vocab_size_per_layer_input", default=262_144
    )

    def takes(self, layer: int) -> bool:
        """Whether a layer uses the keys and values of another one."""
        return layer >= self.layers - self.shared


def rows(d: Gemma4Dims) -> Iterator[Row]:
    yield from ends(d, embedding=(normalizer(d),))
    mlp = routed_mlp if d.experts > 1 else gated_mlp
    yield from each(local_layers(d.layers), norms(d), attention(d), qk_norms(d), mlp(d), scalar())
    parts = "qk" if d.keys_are_values else "qkv"
    attn, qk = attention(d.full, parts=parts), qk_norms(d.full)
    yield from each(full_layers(d.layers), norms(d), attn, qk, mlp(d), scalar())
    if d.multimodal:
        yield from gemma4_vit(d, d.vit_positions)


def small_rows(d: SmallDims) -> Iterator[Row]:
    yield from ends(d, embedding=(normalizer(d),))
    at, name, n = "decoder/per_layer_embedder", "model.per_layer", d.per_layer * d.layers
    table = rearrange("v n -> v n", v=d.per_layer_vocab, n=n)
    embedding = hf("model.embed_tokens_per_layer.weight") >> table
    yield row(f"{at}/embed_tokens_per_layer", "vocab embed_vocab", embedding)
    projection = hf(f"{name}_model_projection.weight") >> rearrange("n e -> e n", n=n, e=d.emb)
    yield row(f"{at}/per_layer_model_projection/kernel", "embed mlp", projection)
    weight = hf(f"{name}_projection_norm.weight") >> rearrange("p -> p", p=d.per_layer)
    yield row(f"{at}/per_layer_projection_norm/scale", "norm", weight)
    for layer, kind in enumerate(d.kinds[: d.layers]):
        one = ((f"layers_{layer}", layer),)
        yield from each(Layers(one, one), small_layer(d, kind == "full_attention", d.takes(layer)))


def small_layer(d: SmallDims, full: bool, takes: bool) -> Iterator[Row]:
    """`takes`: whether it uses the keys and values of another layer."""
    sizes = d.full if full else d
    yield from norms(d)
    yield from attention(sizes, parts="q" if takes else "qkv")
    yield from qk_norms(sizes, parts="q" if takes else "qk")
    yield from gated_mlp(replace(d, mlp=2 * d.mlp) if takes and d.wide else d)
    yield from scalar()
    for part, pattern, axes in (
        ("per_layer_input_gate", "p e -> e p", "embed mlp"),
        ("per_layer_projection", "e p -> p e", "mlp embed"),
    ):
        weight = hf(f"{LAYER}.{part}.weight") >> rearrange(pattern, p=d.per_layer, e=d.emb)
        yield row(f"decoder/{{layers}}/{part}/kernel", axes, weight)
    yield norm("post_per_layer_input_norm", "post_per_layer_input_norm", d.emb)


def routed_mlp(d: Dims) -> Iterator[Row]:
    """A gated MLP and routed experts side by side; gate and up of all experts are one tensor."""
    for name in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1"):
        yield norm(f"mlp/{name}", name, d.emb)
    yield norm("mlp/post_feedforward_layernorm_2", "post_feedforward_layernorm_2", d.emb)
    yield from gated_mlp(d, at="mlp/moe_block/shared_experts")
    before = hf(f"{LAYER}.router.scale") >> rearrange("e -> e", e=d.emb)
    yield row("decoder/{layers}/mlp/pre_forward_scale_2", "embed", before)
    moe = "mlp/moe_block/MoeBlock_0"
    at, x = f"decoder/{{layers}}/{moe}", d.experts
    router = hf(f"{LAYER}.router.proj.weight") >> rearrange("x e -> e x", x=x, e=d.emb)
    yield row(f"{at}/gate/kernel", "embed_router -", router)
    per_expert = hf(f"{LAYER}.router.per_expert_scale") >> rearrange("x -> x", x=x)
    yield row(f"{at}/per_expert_scale", "exp", per_expert)
    yield from fused_kernels(d, moe, "experts", inwards="x m e", outwards="x e m")


def scalar() -> Iterator[Row]:
    """The factor for a layer's output, (1,)."""
    weight = hf(f"{LAYER}.layer_scalar") >> rearrange("n -> n", n=1)
    yield row("decoder/{layers}/layer_scalar", "-", weight)


def normalizer(d: Dims):
    return scale(float(np.float32(math.sqrt(d.emb))))


def local_layers(count: int) -> Layers:
    """Layers with sliding attention: stacked within each block, and over the blocks."""
    blocks = [range(first, min(first + BLOCK - 1, count)) for first in range(0, count, BLOCK)]
    whole = count // BLOCK
    scanned: list[tuple[str, Numbers]] = []
    if whole:
        scanned.append(("scanned_blocks/local_layers", blocks[:whole]))
    if count % BLOCK:
        scanned.append(("layers_remainder/local_layers", blocks[whole]))
    numbers = [n for block in blocks for n in block]
    return Layers(tuple(scanned), one_by_one(numbers), ("layers", "local_layers"))


def full_layers(count: int) -> Layers:
    """Layers with full attention: one per block."""
    numbers = range(BLOCK - 1, count, BLOCK)
    stacked = (("scanned_blocks/global_layer", numbers),) if numbers else ()
    return Layers(stacked, one_by_one(numbers))


def one_by_one(numbers: Sequence[int]) -> tuple[tuple[str, int], ...]:
    return tuple((f"layers_{n}", n) for n in numbers)


def taken(d: SmallDims) -> Iterator[str]:
    """Unused tensors: published files have keys and values of layers that use those of others."""
    for layer in filter(d.takes, range(d.layers)):
        for part in ("k_proj", "v_proj", "k_norm"):
            yield f"model.layers.{layer}.self_attn.{part}.weight"


def small_cycle(d: SmallDims, name: str) -> int:
    """After how many layers one of full attention comes, under a model_name of MaxText."""
    return BLOCK - 1 if name == "gemma4-e2b" else BLOCK


COMPUTES = Computation(
    settings=(
        epsilon(),
        activation("gelu_pytorch_tanh"),
        window(512),
        *SOFT_CAPS,
        Setting("num_experts_per_tok", ("top_k_experts",), None, lambda n: n or 1),
        Setting("share_kv_projections", ("attention_k_eq_v",), False),
    ),
    fixed=(layer_kinds(lambda d, name: BLOCK),),
    bases={FULL: 1_000_000.0, SLIDING: 10_000.0},
    rope=rope.gemma4,
    split=True,
    turned=lambda d, attention: d.full_head_dim if attention == FULL else d.head_dim,
    has_sliding=True,
    scaled_table=True,
)

GEMMA4 = Family(
    architectures=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    model_types=("gemma4", "gemma4_text"),
    ties=True,
    decoder_block="gemma4",
    rows=rows,
    sizes=Gemma4Dims,
    computes=COMPUTES,
    names=(
        ("model.language_model.", "model."),
        ("model.vision_tower.encoder.layers.*.*.*.linear.", "vision_tower.encoder.layers.*.*.*."),
        ("model.vision_tower.", "vision_tower."),
        ("model.embed_vision.", "embed_vision."),
    ),
    encoders=("vision_tower.*", "embed_vision.*"),
    pads_vocab=True,
)
GEMMA4_SMALL = replace(
    GEMMA4,
    decoder_block="gemma4_small",
    marked_by="num_kv_shared_layers",
    rows=small_rows,
    computes=replace(COMPUTES, fixed=(layer_kinds(small_cycle),)),
    sizes=SmallDims,
    ignored=("model.*_tower.*", "model.embed_vision.*", "model.embed_audio.*"),
    spare=taken,
    names=(("model.language_model.", "model."),),
    encoders=(),
    scans=False,
)
