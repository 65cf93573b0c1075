"""Qwen3.5 MoE: Qwen3-Next with differently split tensors, and with vision.

transformers modeling_qwen3_5_moe.py; MaxText models/qwen3_5.py.
"""

from dataclasses import dataclass, replace

from maxconv.algebra import Concat, Expr, Slice, hf, rearrange
from maxconv.families import rope
from maxconv.families.blocks import FUSED, LAYER, ends, fused_experts
from maxconv.families.qwen_next import (
    HybridDims,
    delta_net,
    gated_attention,
    norms,
    shared_expert,
)
from maxconv.families.settings import Computation, activation, chosen_experts, epsilon
from maxconv.families.table import Family, cycle, each
from maxconv.families.vision import QwenVisionDims, qwen_vision


@dataclass(frozen=True, kw_only=True)
class Dims(HybridDims, QwenVisionDims):
    """The sizes of the decoder and of the vision encoder."""


def rows(d: Dims):
    yield from ends(d)
    experts = fused_experts(d, "mlp/routed_experts", "mlp", inwards="x m e", outwards="x e m")
    layer = (*norms(d), *shared_expert(d), *experts)
    *local, full = cycle(d.layers, d.cycle, "layer")
    for layers in local:
        yield from each(layers, layer, delta_net(d, qkvz(d), ba(d)))
    yield from each(full, layer, gated_attention(d))
    if d.multimodal:
        yield from qwen_vision(d, "Qwen3_5Moe")


def qkvz(d: Dims) -> Expr:
    """For each key head its query and key, and the values and gates of its group."""
    name = f"{LAYER}.linear_attn"
    keys, values = d.delta_keys * d.key_dim, d.delta_values * d.value_dim
    qkv = hf(f"{name}.in_proj_qkv.weight")
    query, key = ((qkv >> Slice(0, start, keys), d.key_dim) for start in (0, keys))
    of_group = values // d.delta_keys
    value, gate = qkv >> Slice(0, 2 * keys, values), hf(f"{name}.in_proj_z.weight")
    return woven(d, query, key, (value, of_group), (gate, of_group))


def ba(d: Dims) -> Expr:
    """The kernel of beta and alpha, grouped by key head."""
    parts = (hf(f"{LAYER}.linear_attn.in_proj_{part}.weight") for part in "ba")
    return woven(d, *((part, d.delta_values // d.delta_keys) for part in parts))


def woven(d: Dims, *parts: tuple[Expr, int]) -> Expr:
    """Parts with their widths, (heads x width, emb) each, side by side within each key head:
    (emb, ...)."""
    of_heads = (
        part >> rearrange("(h j) e -> h j e", h=d.delta_keys, j=width, e=d.emb)
        for part, width in parts
    )
    return Concat(1, tuple(of_heads)) >> rearrange("h j e -> e (h j)")


def in_blocks(d: Dims, n: int) -> Dims:
    names = ("emb", "mlp", "moe_mlp", "head_dim", "key_dim", "value_dim")
    return replace(d, **{name: getattr(d, name) // n for name in names})


QWEN3_5_MOE = Family(
    architectures=("Qwen3_5MoeForConditionalGeneration",),
    model_types=("qwen3_5_moe",),
    decoder_block="qwen3_5",
    rows=rows,
    sizes=Dims,
    computes=Computation(
        settings=(epsilon(), activation(), chosen_experts(8)),
        rope=rope.partial,
        default_part=0.25,
    ),
    names=(("model.language_model.", "model."),),
    ignored=("mtp.*",),
    encoders=("model.visual.*",),
    fuse_experts=FUSED,
    in_blocks=in_blocks,
)
