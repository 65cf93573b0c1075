"""Vision encoders. transformers modeling_siglip.py; MaxText models/gemma3.py."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maxconv.algebra import hf, rearrange
from maxconv.families.blocks import Ops, Root, attention
from maxconv.families.table import Dims, Row, each, row, size, unrolled


@dataclass(frozen=True, kw_only=True)
class VisionDims(Dims):
    """Those of a decoder and of a vision transformer beside it, as SiglipVisionConfig defaults."""

    vit_emb: int = size("vision_config.hidden_size", maxtext="hidden_size_for_vit", default=768)
    vit_mlp: int = size(
        "vision_config.intermediate_size", maxtext="intermediate_size_for_vit", default=3072
    )
    vit_layers: int = size(
        "vision_config.num_hidden_layers", maxtext="num_hidden_layers_for_vit", default=12
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


def siglip(d: VisionDims, positions: int, norm: Ops, norm_dtype: str) -> Iterator[Row]:
    """SigLIP and the projection of its patches to tokens; `norm`: ops on the norm between."""
    at, name, v = "vision_encoder/Gemma3VisionEncoderLayer_0", "vision_tower", d.vit
    square = {"o": v.emb, "i": d.vit_channels, "y": d.vit_patch, "x": d.vit_patch}
    patches = hf(f"{name}.embeddings.patch_embedding.weight")
    yield row(
        f"{at}/embedding/kernel", "- - - -", patches >> rearrange("o i y x -> y x i o", **square)
    )
    yield _vector(f"{at}/embedding/bias", f"{name}.embeddings.patch_embedding.bias", v.emb)
    table = hf(f"{name}.embeddings.position_embedding.weight")
    yield row(
        f"{at}/pos_embedding", "- - -", table >> rearrange("n e -> 1 n e", n=positions, e=v.emb)
    )

    root = Root(f"{at}/Transformer/{{layers}}", f"{name}.encoder.layers.{{l}}")
    yield from each(unrolled(v.layers, "encoderblock"), _siglip_layer(v, root))
    yield from _layer_norm(f"{at}/Transformer/encoder_norm", f"{name}.post_layernorm", v.emb)

    at, name = "vision_encoder/VisionEmbedder_0", "multi_modal_projector"
    kernel = hf(f"{name}.mm_input_projection_weight") >> rearrange("v e -> v e", v=v.emb, e=d.emb)
    yield row(f"{at}/mm_input_projection/w", "- -", kernel)
    scale = hf(f"{name}.mm_soft_emb_norm.weight") >> rearrange("v -> v", v=v.emb) >> norm
    yield row(f"{at}/mm_soft_embedding_norm/scale", "norm", scale, dtype=norm_dtype)


def _siglip_layer(v: Dims, root: Root) -> Iterator[Row]:
    heads, mlp = "MultiHeadDotProductAttention_0", f"{root.path}/MlpBlockViT_0"
    yield from _layer_norm(f"{root.path}/LayerNorm_0", f"{root.name}.layer_norm1", v.emb)
    yield from attention(v, bias=True, at=heads, root=root, out="out_proj")
    out = f"{root.name}.self_attn.out_proj.bias"
    yield _vector(f"{root.path}/{heads}/out/bias", out, v.emb, "embed_attn")
    yield from _layer_norm(f"{root.path}/LayerNorm_1", f"{root.name}.layer_norm2", v.emb)
    yield from _dense(f"{mlp}/Dense_0", f"{root.name}.mlp.fc1", v.emb, v.mlp)
    yield from _dense(f"{mlp}/Dense_1", f"{root.name}.mlp.fc2", v.mlp, v.emb)


def _layer_norm(at: str, name: str, n: int) -> Iterator[Row]:
    yield _vector(f"{at}/scale", f"{name}.weight", n)
    yield _vector(f"{at}/bias", f"{name}.bias", n)


def _dense(at: str, name: str, n: int, m: int) -> Iterator[Row]:
    """A layer from n to m features."""
    yield row(f"{at}/kernel", "- -", hf(f"{name}.weight") >> rearrange("m n -> n m", m=m, n=n))
    yield _vector(f"{at}/bias", f"{name}.bias", m)


def _vector(at: str, name: str, n: int, axis: str = "-") -> Row:
    return row(at, axis, hf(name) >> rearrange("n -> n", n=n))
