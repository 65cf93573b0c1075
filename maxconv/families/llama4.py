"""Llama 4. transformers modeling_llama4.py; MaxText models/llama4.py, layers/moe.py.

Both turn neighbours of a head, and MaxText's decoder scales queries: nothing is reordered or
scaled. Every few layers one has no RoPE, and one has experts; the pattern of both is a cycle.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from maxconv.algebra import hf, rearrange
from maxconv.families import rope
from maxconv.families.blocks import (
    Root,
    attention,
    ends,
    fused_kernels,
    gated_mlp,
    pre_norms,
    projection,
)
from maxconv.families.dims import MOST_LAYERS, Dims, layer_count, size
from maxconv.families.rope import FULL
from maxconv.families.settings import Computation, Fixed, Setting, activation, epsilon
from maxconv.families.table import Family, Row, cycle, each, row, unrolled
from maxconv.families.vision import VisionDims, dense, layer_norm, vector

NOPE = 4  # of so many layers the last has no RoPE, if config.json does not say


@dataclass(frozen=True, kw_only=True)
class Llama4Dims(VisionDims):
    """Defaults as in Llama4TextConfig and Llama4VisionConfig.

    `mlp` is the width of layers without experts, if there are any. Of `step` layers the last has
    experts, of `nope` the last has no RoPE. `vit_token`: the width of a token from the encoder,
    which `vit_inner` is on the way to.
    """

    head_dim: int = size("head_dim", maxtext="head_dim", default=128)
    moe_mlp: int = size("intermediate_size", maxtext="base_moe_mlp_dim")
    mlp: int = size(
        "intermediate_size_mlp", maxtext="base_mlp_dim", default=16_384, only_if="has_dense"
    )
    shared: int = size(maxtext="shared_experts", default=1)
    step: int = size(
        "interleave_moe_layer_step",
        maxtext="interleave_moe_layer_step",
        default=1,
        most=MOST_LAYERS,
    )
    nope: int = size(
        "no_rope_layer_interval", maxtext="nope_layer_interval", default=NOPE, most=MOST_LAYERS
    )
    cycle: int = size(
        maxtext="inhomogeneous_layer_cycle_interval",
        default=lambda d: math.lcm(d["step"], d["nope"]),
    )
    vit_mlp: int = size(
        "vision_config.intermediate_size", maxtext="intermediate_size_for_vit", default=5632
    )
    vit_layers: int = layer_count(
        "vision_config.num_hidden_layers",
        maxtext="num_hidden_layers_for_vit",
        numbered="vision_model.model.layers.",
        default=34,
    )
    vit_heads: int = size(
        "vision_config.num_attention_heads", maxtext="num_attention_heads_for_vit", default=16
    )
    vit_patch: int = size("vision_config.patch_size", maxtext="patch_size_for_vit", default=14)
    vit_image: int = size("vision_config.image_size", maxtext="image_size_for_vit", default=448)
    vit_tile: int = size("vision_config.image_size", maxtext="tile_size_for_vit", default=448)
    vit_inner: int = size(
        "vision_config.projector_input_dim", maxtext="projector_input_dim_for_vit", default=4096
    )
    vit_token: int = size(
        "vision_config.projector_output_dim", maxtext="projector_output_dim_for_vit", default=4096
    )
    vit_out: int = size(
        "vision_config.vision_output_dim", maxtext="vision_output_dim_for_vit", default=7680
    )

    @property
    def has_dense(self) -> bool:
        return self.step > 1

    def turns(self, layer: int) -> bool:
        """Whether a layer has RoPE."""
        return self.nope < 1 or (layer + 1) % self.nope != 0


def rows(d: Llama4Dims) -> Iterator[Row]:
    yield from ends(d)
    for k, layers in enumerate(cycle(d.layers, d.cycle)):
        is_moe = (k + 1) % d.step == 0
        mlp = experts(d) if is_moe else gated_mlp(d, name="feed_forward")
        yield from each(layers, pre_norms(d), attention(d), mlp)
    if d.multimodal:
        yield from vision(d)


def experts(d: Llama4Dims) -> Iterator[Row]:
    """A router and its experts, and a shared expert."""
    at, name = "Llama4MoEBlock_0", "feed_forward"
    axes = "embed_router -"
    yield projection(f"{at}/MoeBlock_0/gate", axes, f"{name}.router", d.emb, d.experts)
    yield from fused_kernels(d, f"{at}/MoeBlock_0", f"{name}.experts", "x e m", "x m e")
    wide = replace(d, mlp=d.shared * d.moe_mlp)
    yield from gated_mlp(wide, f"{at}/shared_experts", name=f"{name}.shared_expert")


def vision(d: Llama4Dims) -> Iterator[Row]:
    """A vision transformer, the adapter that puts four patches together, and the projection."""
    at, name, v = "vision_encoder/Llama4VisionModel_0", "vision_model", d.vit
    pixels, patches = d.vit_channels * d.vit_patch**2, (d.vit_tile // d.vit_patch) ** 2
    unfold = f"{at}/Llama4UnfoldConvolution_0/vit_unfold_linear"
    yield linear(unfold, f"{name}.patch_embedding.linear", pixels, v.emb)
    yield vector(f"{at}/class_embedding", f"{name}.class_embedding", v.emb)
    table = rearrange("n e -> n e", n=patches + 1, e=v.emb)
    positions = hf(f"{name}.positional_embedding_vlm") >> table
    yield row(f"{at}/positional_embedding_vlm", "- -", positions)
    for part in ("layernorm_pre", "layernorm_post"):
        yield from layer_norm(f"{at}/{part}", f"{name}.{part}", v.emb)
    root = Root(f"{at}/Llama4VisionEncoder_0/{{layers}}", f"{name}.model.layers.{{l}}")
    yield from each(unrolled(v.layers, "layers"), vision_layer(v, root))
    mlp, adapter = f"{at}/Llama4VisionPixelShuffleMLP_0/pixel_shuffle_mlp", "vision_adapter.mlp"
    for i, n in ((1, d.vit_mlp), (2, d.vit_inner)):
        m = d.vit_inner if i == 1 else d.vit_token
        yield linear(f"{mlp}/vit_pixel_shuffle_mlp_fc{i}", f"{name}.{adapter}.fc{i}", n, m)
    at = "vision_encoder/Llama4MultiModalProjector_0/vit_multi_modal_projector"
    yield linear(at, "multi_modal_projector.linear_1", d.vit_out, d.emb)


def vision_layer(v: Dims, root: Root) -> Iterator[Row]:
    attn, mlp = "self_attention_vision", f"{root.path}/Llama4VisionMLP_0"
    yield from layer_norm(f"{root.path}/input_layer_norm", f"{root.name}.input_layernorm", v.emb)
    yield from attention(v, bias=True, at=attn, root=root)
    out = f"{root.name}.self_attn.o_proj.bias"
    yield vector(f"{root.path}/{attn}/out/bias", out, v.emb, "embed_attn")
    at = f"{root.path}/post_attention_layer_norm"
    yield from layer_norm(at, f"{root.name}.post_attention_layernorm", v.emb)
    yield from dense(f"{mlp}/vit_encoder_layer_mlp_fc1", f"{root.name}.mlp.fc1", v.emb, v.mlp)
    yield from dense(f"{mlp}/vit_encoder_layer_mlp_fc2", f"{root.name}.mlp.fc2", v.mlp, v.emb)


def linear(at: str, name: str, n: int, m: int) -> Row:
    """A layer from n to m features, without a bias."""
    return row(f"{at}/kernel", "- -", hf(f"{name}.weight") >> rearrange("m n -> n m", m=m, n=n))


def kinds(d: Llama4Dims, name: str) -> list[str]:
    return ["chunked_attention" if d.turns(layer) else FULL for layer in range(d.layers)]


def turned(d: Llama4Dims, name: str) -> list[int]:
    return [int(d.turns(layer)) for layer in range(d.layers)]


def chunk(tokens: Any) -> int:
    """MaxText has no layers with RoPE and full attention."""
    if not tokens:
        raise KeyError(tokens)
    return tokens


def listed(text: Mapping[str, Any]) -> Any:
    """Which layers have RoPE; a list that is empty is that of the interval."""
    return text.get("no_rope_layers") or None


LLAMA4 = Family(
    architectures=("Llama4ForConditionalGeneration", "Llama4ForCausalLM"),
    model_types=("llama4", "llama4_text"),
    decoder_block="llama4",
    rows=rows,
    sizes=Llama4Dims,
    computes=Computation(
        settings=(
            epsilon(1e-5),
            activation(),
            Setting("use_qk_norm", ("use_qk_norm",), True),
            Setting("chunk_attn_window_size", ("attention_chunk_size",), 8192, chunk),
            Setting("temperature_tuning", ("attn_temperature_tuning",), True, bool),
        ),
        fixed=(
            Fixed(("num_experts_per_tok",), 1, lambda d, name: 1),
            Fixed(("floor_scale",), 8192, lambda d, name: 8192),
            Fixed(("attn_scale",), 0.1, lambda d, name: 0.1),
            Fixed(("no_rope_layers",), None, turned, listed),
            Fixed(("layer_types",), None, kinds),
        ),
        bases={FULL: 500_000.0},
        rope=rope.pairs,
    ),
    names=(("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    encoders=("vision_model.*", "multi_modal_projector.*"),
)
