"""Multimodal Qwen3: Qwen3-VL (dense and MoE), Weaver, and Qwen3-Omni, which also has audio.

transformers modeling_qwen3_vl.py, modeling_qwen3_vl_moe.py, modeling_qwen3_omni_moe.py; MaxText
models/qwen3.py. Weaver is Qwen3-VL with other tensor names. Vision features are added in several
decoder layers, so MaxText cannot scan them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maxconv.algebra import hf, rearrange
from maxconv.families import rope
from maxconv.families.blocks import FUSED, Root, attention, ends, fused_experts, pre_norms, qk_norms
from maxconv.families.dims import Dims, layer_count, size
from maxconv.families.qwen import ExpertsOnly, qwen3_moe_rows, qwen3_rows
from maxconv.families.rope import FULL
from maxconv.families.settings import (
    Computation,
    activation,
    chosen_experts,
    epsilon,
    normalized_experts,
)
from maxconv.families.table import Family, Row, each, row, uniform, unrolled
from maxconv.families.vision import QwenVisionDims, dense, layer_norm, qwen_vision, vector


@dataclass(frozen=True, kw_only=True)
class MoeDims(ExpertsOnly, QwenVisionDims):
    """The sizes of the decoder, which has only MoE layers, and of the vision encoder."""


@dataclass(frozen=True, kw_only=True)
class OmniDims(MoeDims):
    """Adds the sizes of the audio encoder; defaults as in Qwen3OmniMoeAudioEncoderConfig.

    `audio_conv` is the width of its convolutions, `audio_mels` the number of frequencies.
    """

    audio_emb: int = size("audio_config.d_model", maxtext="d_model_for_audio", default=1280)
    audio_mlp: int = size(
        "audio_config.encoder_ffn_dim", maxtext="encoder_ffn_dim_for_audio", default=5120
    )
    audio_layers: int = layer_count(
        "audio_config.encoder_layers",
        maxtext="encoder_layers_for_audio",
        numbered="audio_tower.layers.",
        default=32,
    )
    audio_heads: int = size(
        "audio_config.encoder_attention_heads",
        maxtext="encoder_attention_heads_for_audio",
        default=20,
    )
    audio_mels: int = size(
        "audio_config.num_mel_bins", maxtext="num_mel_bins_for_audio", default=128
    )
    audio_conv: int = size(
        "audio_config.downsample_hidden_size",
        maxtext="downsample_hidden_size_for_audio",
        default=480,
    )
    audio_out: int = size("audio_config.output_dim", maxtext="output_dim_for_audio", default=3584)

    @property
    def audio_dims(self) -> Dims:
        """The sizes of the audio encoder, as those of a decoder."""
        heads = self.audio_heads
        sizes = {"heads": heads, "kv_heads": heads, "head_dim": self.audio_emb // heads}
        return replace(
            self, emb=self.audio_emb, mlp=self.audio_mlp, layers=self.audio_layers, **sizes
        )


def vl_rows(d: QwenVisionDims):
    yield from qwen3_rows(d)
    if d.multimodal:
        yield from qwen_vision(d, "Qwen3VL")


def vl_moe_rows(d: MoeDims):
    experts = fused_experts(d, "moe_block", "mlp", inwards="x e m", outwards="x m e")
    layer = (pre_norms(d), attention(d), qk_norms(d), experts)
    yield from (*ends(d), *each(uniform(d.layers), *layer))
    if d.multimodal:
        yield from qwen_vision(d, "Qwen3VL")


def omni_rows(d: OmniDims):
    yield from qwen3_moe_rows(d)
    if d.multimodal:
        yield from qwen_vision(d, "Qwen3OmniMoe")
    if d.audio:
        yield from audio_encoder(d)


def audio_encoder(d: OmniDims) -> Iterator[Row]:
    """An audio encoder: three convolutions that halve time and frequency, then a transformer."""
    at, name, a = "audio_encoder/Qwen3OmniAudioEncoder_0", "audio_tower", d.audio_dims
    mels = d.audio_mels
    for i in (1, 2, 3):
        sizes = {"o": d.audio_conv, "i": d.audio_conv if i > 1 else 1, "y": 3, "x": 3}
        square = rearrange("o i y x -> y x i o", **sizes)
        kernel = hf(f"{name}.conv2d{i}.weight") >> square
        yield row(f"{at}/conv2d{i}/kernel", "- - - -", kernel)
        yield vector(f"{at}/conv2d{i}/bias", f"{name}.conv2d{i}.bias", d.audio_conv)
        mels = (mels + 1) // 2
    out = rearrange("e c -> c e", c=d.audio_conv * mels, e=a.emb)
    yield row(f"{at}/conv_out/kernel", "- -", hf(f"{name}.conv_out.weight") >> out)
    root = Root(f"{at}/{{layers}}", f"{name}.layers.{{l}}")
    yield from each(unrolled(a.layers, "layers"), _audio_layer(a, root))
    yield from layer_norm(f"{at}/layernorm_post", f"{name}.ln_post", a.emb)
    at = "audio_encoder/Qwen3OmniAudioProjector_0"
    yield from dense(f"{at}/proj1", f"{name}.proj1", a.emb, a.emb)
    yield from dense(f"{at}/proj2", f"{name}.proj2", a.emb, d.audio_out)


def _audio_layer(a: Dims, root: Root) -> Iterator[Row]:
    attn, mlp = "self_attention_audio", f"{root.path}/AudioMLP"
    yield from layer_norm(
        f"{root.path}/input_layer_norm", f"{root.name}.self_attn_layer_norm", a.emb
    )
    yield from attention(a, bias=True, at=attn, root=root, out="out_proj")
    out = f"{root.name}.self_attn.out_proj.bias"
    yield vector(f"{root.path}/{attn}/out/bias", out, a.emb, "embed_attn")
    at = f"{root.path}/post_attention_layer_norm"
    yield from layer_norm(at, f"{root.name}.final_layer_norm", a.emb)
    yield from dense(f"{mlp}/wi", f"{root.name}.fc1", a.emb, a.mlp, "embed mlp")
    yield from dense(f"{mlp}/wo", f"{root.name}.fc2", a.mlp, a.emb, "mlp embed")


SEEING = ("model.visual.*",)

BASES = {FULL: 500_000.0}
ROUTED = Computation(
    settings=(epsilon(), activation(), chosen_experts(8)),
    fixed=(normalized_experts(True),),
    bases=BASES,
    rope=rope.partial,
)
QWEN3_VL = Family(
    architectures=("Qwen3VLForConditionalGeneration",),
    model_types=("qwen3_vl",),
    decoder_block="qwen3",
    rows=vl_rows,
    sizes=QwenVisionDims,
    computes=Computation(bases=BASES, rope=rope.partial),
    names=(("model.language_model.", "model."),),
    encoders=SEEING,
    scans=False,
    pads_vocab=True,
)
QWEN3_VL_MOE = Family(
    architectures=("Qwen3VLMoeForConditionalGeneration",),
    model_types=("qwen3_vl_moe",),
    decoder_block="qwen3_moe",
    rows=vl_moe_rows,
    computes=ROUTED,
    sizes=MoeDims,
    names=(("model.language_model.", "model."),),
    transposed_experts=((".experts.gate_up_proj", ".experts.down_proj"),),
    encoders=SEEING,
    scans=False,
    pads_vocab=True,
)
QWEN3_OMNI_MOE = Family(
    architectures=("Qwen3OmniMoeForConditionalGeneration",),
    model_types=("qwen3_omni_moe",),
    decoder_block="qwen3_moe",
    rows=omni_rows,
    computes=replace(ROUTED, bases={FULL: 1_000_000.0}),
    sizes=OmniDims,
    names=(
        ("thinker.visual.merger.ln_q.", "model.visual.merger.norm."),
        ("thinker.visual.merger.mlp.0.", "model.visual.merger.linear_fc1."),
        ("thinker.visual.merger.mlp.2.", "model.visual.merger.linear_fc2."),
        ("thinker.visual.merger_list.*.ln_q.", "model.visual.deepstack_merger_list.*.norm."),
        ("thinker.visual.merger_list.*.mlp.0.", "model.visual.deepstack_merger_list.*.linear_fc1."),
        ("thinker.visual.merger_list.*.mlp.2.", "model.visual.deepstack_merger_list.*.linear_fc2."),
        ("thinker.visual.", "model.visual."),
        ("thinker.", ""),
    ),
    in_memory=None,  # they differ between transformers 5.23 and 5.24
    ignored=("talker.*", "code2wav.*"),
    split_experts=FUSED,
    encoders=SEEING,
    audio_patterns=("audio_tower.*",),
    scans=False,
    pads_vocab=True,
)
WEAVER = Family(
    architectures=("WeaverOmniForConditionalGeneration",),
    decoder_block="qwen3",
    rows=vl_rows,
    sizes=QwenVisionDims,
    computes=Computation(bases=BASES, rope=rope.partial),
    names=(
        ("layers.*.self_attn.to_q.", "model.layers.*.self_attn.q_proj."),
        ("layers.*.self_attn.to_k.", "model.layers.*.self_attn.k_proj."),
        ("layers.*.self_attn.to_v.", "model.layers.*.self_attn.v_proj."),
        ("layers.*.self_attn.to_out.", "model.layers.*.self_attn.o_proj."),
        ("layers.*.self_attn.norm_q.", "model.layers.*.self_attn.q_norm."),
        ("layers.*.self_attn.norm_k.", "model.layers.*.self_attn.k_norm."),
        *((part, f"model.{part}") for part in ("layers.", "embed_tokens.", "norm.")),
        *(
            (part, f"model.visual.{part}")
            for part in (
                "patch_embed.",
                "pos_embed.",
                "blocks.",
                "merger.",
                "deepstack_merger_list.",
            )
        ),
    ),
    in_memory=None,  # transformers has no such class
    encoders=SEEING,
    scans=False,
    pads_vocab=True,
)
