"""gpt-oss. transformers modeling_gpt_oss.py; MaxText models/gpt_oss.py, layers/moe.py.

Experts are not transposed, and gate and up alternate on the last axis of one tensor. The table is
written for bfloat16 checkpoints; a codec reads OpenAI's own MXFP4 files.
"""

from dataclasses import dataclass

from maxconv.algebra import Slice, hf, rearrange
from maxconv.families.blocks import LAYER, attention, ends, pre_norms
from maxconv.families.dims import Dims, size
from maxconv.families.settings import (
    Computation,
    Setting,
    chosen_experts,
    epsilon,
    layer_kinds,
    window,
)
from maxconv.families.table import Family, cycle, each, row

CYCLE = 2  # a layer of sliding attention, then one of full attention
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150_000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}  # if config.json says nothing


@dataclass(frozen=True, kw_only=True)
class GptOssDims(Dims):
    moe_mlp: int = size("intermediate_size", maxtext="base_moe_mlp_dim")


def rows(d: GptOssDims):
    yield from ends(d)
    for layers in cycle(d.layers, CYCLE):
        yield from each(layers, pre_norms(d), sink_attention(d), experts(d))


def sink_attention(d: GptOssDims):
    """Attention with biases on all four projections, and an attention sink per head."""
    at, name = "decoder/{layers}/GptOssAttention", f"{LAYER}.self_attn"
    yield from attention(d, bias=True, at="GptOssAttention")
    yield row(f"{at}/out/bias", "embed_attn", hf(f"{name}.o_proj.bias") >> vector(d.emb))
    yield row(f"{at}/sinks", "-", hf(f"{name}.sinks") >> vector(d.heads))


def experts(d: GptOssDims):
    """A router and gated MLPs, all with biases."""
    at, name = "decoder/{layers}/GptOssMlp", f"{LAYER}.mlp"
    x, e, m = d.experts, d.emb, d.moe_mlp
    router = hf(f"{name}.router.weight") >> rearrange("x e -> e x", x=x, e=e)
    yield row(f"{at}/gate/kernel", "embed -", router)
    yield row(f"{at}/gate/bias", "-", hf(f"{name}.router.bias") >> vector(x))
    apart = rearrange("x e (m k) -> k x e m", x=x, e=e, m=m, k=2)
    biases_apart = rearrange("x (m k) -> k x m", x=x, m=m, k=2)
    for k in range(2):
        alone = (Slice(0, k, 1), rearrange("1 x e m -> x e m"))
        kernel = hf(f"{name}.experts.gate_up_proj") >> apart >> alone
        yield row(f"{at}/wi_{k}", "exp embed_moe mlp_moe", kernel)
        alone = (Slice(0, k, 1), rearrange("1 x m -> x m"))
        bias = hf(f"{name}.experts.gate_up_proj_bias") >> biases_apart >> alone
        yield row(f"{at}/wi_{k}_bias", "exp activation_mlp", bias)
    down = hf(f"{name}.experts.down_proj") >> rearrange("x m e -> x m e", x=x, m=m, e=e)
    yield row(f"{at}/wo", "exp mlp_moe embed_moe", down)
    bias = hf(f"{name}.experts.down_proj_bias") >> rearrange("x e -> x e", x=x, e=e)
    yield row(f"{at}/wo_bias", "exp activation_embed", bias)


def vector(n: int):
    return rearrange("n -> n", n=n)


GPT_OSS = Family(
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    decoder_block="gpt_oss",
    rows=rows,
    sizes=GptOssDims,
    computes=Computation(
        settings=(
            epsilon(1e-5),
            window(128),
            chosen_experts(4, "experts_per_token"),
            Setting("mlp_activations_limit", ("swiglu_limit",), 7.0),
        ),
        fixed=(layer_kinds(lambda d, name: CYCLE),),
        default_rope=YARN,
        has_sliding=True,
    ),
)
