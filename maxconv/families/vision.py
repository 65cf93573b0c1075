"""Vision encoders. transformers modeling_siglip.py, modeling_gemma4.py; MaxText models/gemma3.py,
models/gemma4_vision.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maxconv.algebra import Slice, hf, rearrange
from maxconv.families.blocks import Ops, Root, attention, gated_mlp, norm, qk_norms
from maxconv.families.dims import Dims, layer_count, size
from maxconv.families.table import Row, each, row, unrolled


@dataclass(frozen=True, kw_only=True)
class VisionDims(Dims):
    """The sizes of a decoder and a vision transformer; defaults as in SiglipVisionConfig."""

    vit_emb: int = size("vision_config.hidden_size", maxtext="hidden_size_for_vit", default=768)
    vit_mlp: int = size(
        "vision_config.intermediate_size", maxtext="intermediate_size_for_vit", default=3072
    )
    vit_layers: int = layer_count(
        "vision_config.num_hidden_layers",
        maxtext="num_hidden_layers_for_vit",
        numbered="vision_tower.encoder.layers.",
        default=12,
    )
    vit_heads: int = size(
        "vision_config.num_attention_heads", maxtext="num_attention_heads_for_vit", default=12
    )
    vit_patch: int = size("vision_config.patch_size", maxtext="patch_size_for_vit", default=16)
    vit_channels: int = size(
        "vision_config.num_channels", maxtext="num_channels_for_vit", default=3
    )

    @property
    def vit(self) -> Dims:
        """The sizes of the vision transformer, as those of a decoder."""
        heads = self.vit_heads
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": self.vit_emb // heads}
        return replace(self, emb=self.vit_emb, mlp=self.vit_mlp, layers=self.vit_layers, **sizes)


def siglip(d: VisionDims, positions: int, ops: Ops, dtype: str) -> Iterator[Row]:
    """SigLIP, and the projection of patches to tokens; `ops`, `dtype`: of the norm in between."""
    at, name, v = "vision_encoder/Gemma3VisionEncoderLayer_0", "vision_tower", d.vit
    square = {"o": v.emb, "i": d.vit_channels, "y": d.vit_patch, "x": d.vit_patch}
    patches = hf(f"{name}.embeddings.patch_embedding.weight")
    yield row(
        f"{at}/embedding/kernel", "- - - -", patches >> rearrange("o i y x -> y x i o", **square)
    )
    yield vector(f"{at}/embedding/bias", f"{name}.embeddings.patch_embedding.bias", v.emb)
    table = hf(f"{name}.embeddings.position_embedding.weight")
    yield row(
        f"{at}/pos_embedding", "- - -", table >> rearrange("n e -> 1 n e", n=positions, e=v.emb)
    )

    root = Root(f"{at}/Transformer/{{layers}}", f"{name}.encoder.layers.{{l}}")
    yield from each(unrolled(v.layers, "encoderblock"), _siglip_layer(v, root))
    yield from layer_norm(f"{at}/Transformer/encoder_norm", f"{name}.post_layernorm", v.emb)

    at, name = "vision_encoder/VisionEmbedder_0", "multi_modal_projector"
    kernel = hf(f"{name}.mm_input_projection_weight") >> rearrange("v e -> v e", v=v.emb, e=d.emb)
    yield row(f"{at}/mm_input_projection/w", "- -", kernel)
    scale = hf(f"{name}.mm_soft_emb_norm.weight") >> rearrange("v -> v", v=v.emb) >> ops
    yield row(f"{at}/mm_soft_embedding_norm/scale", "norm", scale, dtype=dtype)


def _siglip_layer(v: Dims, root: Root) -> Iterator[Row]:
    heads, mlp = "MultiHeadDotProductAttention_0", f"{root.path}/MlpBlockViT_0"
    yield from layer_norm(f"{root.path}/LayerNorm_0", f"{root.name}.layer_norm1", v.emb)
    yield from attention(v, bias=True, at=heads, root=root, out="out_proj")
    out = f"{root.name}.self_attn.out_proj.bias"
    yield vector(f"{root.path}/{heads}/out/bias", out, v.emb, "embed_attn")
    yield from layer_norm(f"{root.path}/LayerNorm_1", f"{root.name}.layer_norm2", v.emb)
    yield from dense(f"{mlp}/Dense_0", f"{root.name}.mlp.fc1", v.emb, v.mlp)
    yield from dense(f"{mlp}/Dense_1", f"{root.name}.mlp.fc2", v.mlp, v.emb)


def layer_norm(at: str, name: str, n: int) -> Iterator[Row]:
    """A norm of n features, with a bias."""
    yield vector(f"{at}/scale", f"{name}.weight", n)
    yield vector(f"{at}/bias", f"{name}.bias", n)


def dense(at: str, name: str, n: int, m: int, axes: str = "- -") -> Iterator[Row]:
    """A layer from n to m features, with a bias."""
    yield row(f"{at}/kernel", axes, hf(f"{name}.weight") >> rearrange("m n -> n m", m=m, n=n))
    yield vector(f"{at}/bias", f"{name}.bias", m, axes.split()[1])


def vector(at: str, name: str, n: int, axis: str = "-") -> Row:
    """A bias, or a scale."""
    return row(at, axis, hf(name) >> rearrange("n -> n", n=n))


@dataclass(frozen=True, kw_only=True)
class QwenVisionDims(VisionDims):
    """The sizes of Qwen's vision transformers; defaults as in Qwen3VLVisionConfig.

    `vit_merge`: side length, in patches, of the square that becomes a token. `vit_out`: its width.
    `vit_deepstack`: layers whose output is merged as well, each by a merger of its own.
    """

    vit_emb: int = size("vision_config.hidden_size", maxtext="hidden_size_for_vit", default=1152)
    vit_mlp: int = size(
        "vision_config.intermediate_size", maxtext="intermediate_size_for_vit", default=4304
    )
    vit_layers: int = layer_count(
        "vision_config.depth",
        maxtext="num_hidden_layers_for_vit",
        numbered="model.visual.blocks.",
        default=27,
    )
    vit_heads: int = size(
        "vision_config.num_heads", maxtext="num_attention_heads_for_vit", default=16
    )
    vit_channels: int = size("vision_config.in_channels", maxtext="num_channels_for_vit", default=3)
    vit_frames: int = size(
        "vision_config.temporal_patch_size", maxtext="temporal_patch_size_for_vit", default=2
    )
    vit_merge: int = size(
        "vision_config.spatial_merge_size", maxtext="spatial_merge_size_for_vit", default=2
    )
    vit_out: int = size(
        "vision_config.out_hidden_size", maxtext="out_hidden_size_for_vit", default=3584
    )
    vit_positions: int = size(
        "vision_config.num_position_embeddings",
        maxtext="num_position_embeddings_for_vit",
        default=2304,
    )
    vit_deepstack: list = size(
        "vision_config.deepstack_visual_indexes",
        maxtext="deepstack_visual_indexes_for_vit",
        default=[],
        numbered="model.visual.deepstack_merger_list.",
    )


def qwen_vision(d: QwenVisionDims, maker: str) -> Iterator[Row]:
    """A vision transformer and the mergers of its patches (transformers modeling_qwen3_vl.py).

    `maker`: prefix of the names of MaxText's modules (models/qwen3.py, models/qwen3_5.py).
    """
    at, name, v = f"vision_encoder/{maker}VisionEncoder_0", "model.visual", d.vit
    cube = {"t": d.vit_frames, "y": d.vit_patch, "x": d.vit_patch, "i": d.vit_channels}
    patches = rearrange("o i t y x -> t y x i o", o=v.emb, **cube)
    proj = f"{name}.patch_embed.proj"
    yield row(f"{at}/patch_embed/proj/kernel", "- - - - -", hf(f"{proj}.weight") >> patches)
    yield vector(f"{at}/patch_embed/proj/bias", f"{proj}.bias", v.emb)
    table = hf(f"{name}.pos_embed.weight") >> rearrange("n e -> n e", n=d.vit_positions, e=v.emb)
    yield row(f"{at}/pos_embed_interpolate/pos_embed", "- -", table)

    root = Root(f"{at}/{{layers}}", f"{name}.blocks.{{l}}")
    yield from each(unrolled(v.layers, "blocks"), _qwen_block(v, root))
    patch, token = v.emb, v.emb * d.vit_merge**2
    for i in range(len(d.vit_deepstack)):
        deep = f"{name}.deepstack_merger_list.{i}"
        yield from _merger(f"{at}/merger_{i}", deep, token, token, d.vit_out)
    at = f"vision_encoder/{maker}VisionProjector_0/merger"
    yield from _merger(at, f"{name}.merger", patch, token, d.vit_out)


def _qwen_block(v: Dims, root: Root) -> Iterator[Row]:
    attn, of = f"{root.path}/attn/attn", f"{root.name}.attn"
    yield from layer_norm(f"{root.path}/ln1", f"{root.name}.norm1", v.emb)
    sizes = {"h": v.heads, "d": v.head_dim}
    for i, (part, axes) in enumerate(
        (
            ("query", "q_heads kv"),
            ("key", "kv_heads kv_head_dim"),
            ("value", "kv_heads kv_head_dim"),
        )
    ):
        third = Slice(0, i * v.emb, v.emb)
        split = rearrange("(h d) e -> e h d", e=v.emb, **sizes)
        kernel = hf(f"{of}.qkv.weight") >> third >> split
        yield row(f"{attn}/{part}/kernel", f"embed_attn {axes}", kernel)
        bias = hf(f"{of}.qkv.bias") >> third >> rearrange("(h d) -> h d", **sizes)
        yield row(f"{attn}/{part}/bias", axes, bias)
    merge = hf(f"{of}.proj.weight") >> rearrange("e (h d) -> h d e", e=v.emb, **sizes)
    yield row(f"{attn}/out/kernel", "heads kv embed_attn", merge)
    yield vector(f"{attn}/out/bias", f"{of}.proj.bias", v.emb, "embed_attn")
    yield from layer_norm(f"{root.path}/ln2", f"{root.name}.norm2", v.emb)
    yield from dense(f"{root.path}/mlp", f"{root.name}.mlp.linear_fc1", v.emb, v.mlp)
    yield from dense(f"{root.path}/mlp_out", f"{root.name}.mlp.linear_fc2", v.mlp, v.emb)


def _merger(at: str, name: str, norm: int, token: int, out: int) -> Iterator[Row]:
    """Merges adjacent patches into one token; `norm`: features that are normalised together."""
    yield from layer_norm(f"{at}/ln_q", f"{name}.norm", norm)
    yield from dense(f"{at}/mlp_0", f"{name}.linear_fc1", token, token)
    yield from dense(f"{at}/mlp_2", f"{name}.linear_fc2", token, out)


def gemma4_vit(d: VisionDims, positions: int) -> Iterator[Row]:
    """The vision transformer of Gemma 4, and the projection of its patches to tokens."""
    at, name, v = "vision_encoder/Gemma4VisionEncoderLayer_0", "vision_tower", d.vit
    pixels = d.vit_channels * d.vit_patch**2
    kernel = hf(f"{name}.patch_embedder.input_proj.weight") >> rearrange(
        "o i -> i o", o=v.emb, i=pixels
    )
    yield row(f"{at}/vision_entry/input_projection/kernel", "- -", kernel)
    table = hf(f"{name}.patch_embedder.position_embedding_table")
    by_position = rearrange("a n e -> n a e", a=2, n=positions, e=v.emb)
    yield row(f"{at}/vision_entry/pos_emb_param", "- - -", table >> by_position)
    root = Root(f"{at}/{{layers}}", f"{name}.encoder.layers.{{l}}")
    yield from each(unrolled(v.layers, "layer"), _gemma4_vit_layer(v, root))
    yield vector(f"{at}/std_scale", f"{name}.std_scale", v.emb)
    yield vector(f"{at}/std_bias", f"{name}.std_bias", v.emb)
    kernel = hf("embed_vision.embedding_projection.weight") >> rearrange(
        "e v -> v e", v=v.emb, e=d.emb
    )
    yield row("vision_encoder/Gemma4VisionProjector_0/projection/kernel", "embed mlp", kernel)


def _gemma4_vit_layer(v: Dims, root: Root) -> Iterator[Row]:
    yield from attention(v, at="attention", root=root)
    yield from qk_norms(v, at="attention", root=root)
    for path, name in (
        ("pre_attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ):
        yield norm(path, name, v.emb, root=root)
    yield from gated_mlp(v, root=root)
