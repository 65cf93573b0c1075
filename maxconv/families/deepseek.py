"""DeepSeek V2, V3 and V3.2: latent attention; routed and shared experts after dense layers.

transformers modeling_deepseek_v2.py, modeling_deepseek_v3.py, modeling_deepseek_v32.py; MaxText
models/deepseek.py, layers/attention_mla.py, layers/multi_token_prediction.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from maxconv.algebra import hf, rearrange
from maxconv.families import rope
from maxconv.families.blocks import (
    DECODER,
    FUSED,
    Root,
    attention,
    ends,
    gated_mlp,
    norm,
    pre_norms,
    projection,
    routed_experts,
)
from maxconv.families.dims import DECODER_LAYERS, MOST_EXPERTS, MOST_LAYERS, Dims, layer_count, size
from maxconv.families.settings import (
    Computation,
    Fixed,
    Setting,
    activation,
    chosen_experts,
    epsilon,
    normalized_experts,
    or_none,
)
from maxconv.families.table import Family, Layers, Row, each, row, uniform


@dataclass(frozen=True, kw_only=True)
class DeepSeekDims(Dims):
    """A query or key has `rope` dimensions with RoPE and `nope` without.

    `head_dim` is that of values. `q_lora` is 0 if queries have a single projection.
    """

    head_dim: int = size("v_head_dim", maxtext="v_head_dim")
    experts: int = size("n_routed_experts", maxtext="num_experts", most=MOST_EXPERTS)
    shared: int = size("n_shared_experts", maxtext="shared_experts")
    dense: int = size(
        "first_k_dense_replace", maxtext="first_num_dense_layers", least=0, most=MOST_LAYERS
    )
    q_lora: int = size("q_lora_rank", maxtext="q_lora_rank", default=0, least=0)
    kv_lora: int = size("kv_lora_rank", maxtext="kv_lora_rank")
    nope: int = size("qk_nope_head_dim", maxtext="qk_nope_head_dim")
    rope: int = size("qk_rope_head_dim", maxtext="qk_rope_head_dim")
    mtp: int = layer_count(
        "num_nextn_predict_layers",
        maxtext="mtp_num_layers",
        numbered=DECODER_LAYERS,
        default=0,
        least=0,
    )


@dataclass(frozen=True, kw_only=True)
class IndexerDims(DeepSeekDims):
    """The indexer selects the tokens that attention attends to."""

    index_heads: int = size("index_n_heads", maxtext="indexer_n_heads")
    index_dim: int = size("index_head_dim", maxtext="indexer_head_dim")


def v2_rows(d: DeepSeekDims) -> Iterator[Row]:
    yield from ends(d)
    for layers, root, mlp in parts(d):
        yield from each(layers, pre_norms(d, root), latent_attention(d, root), mlp)


def v3_rows(d: DeepSeekDims) -> Iterator[Row]:
    yield from v2_rows(d)
    for layers, root, _ in parts(d)[1:]:
        yield from each(layers, [routed_bias(d, root)])
    yield from each(parts(d)[-1][0], prediction(d))


def v32_rows(d: IndexerDims) -> Iterator[Row]:
    yield from v3_rows(d)
    for layers, root, _ in parts(d):
        yield from each(layers, indexer(d, root))


def parts(d: DeepSeekDims) -> list[tuple[Layers, Root, list[Row]]]:
    """Dense layers, MoE layers, and layers for multi-token prediction, each with its MLP."""
    dense = min(d.dense, d.layers)
    routed = uniform(d.layers - dense, "moe_layers", dense)
    further = tuple((str(k + 1), d.layers + k) for k in range(d.mtp))
    return [
        (uniform(dense, "dense_layers"), DECODER, list(gated_mlp(d))),
        (routed, DECODER, list(experts(d, DECODER))),
        (Layers(further, further), LAYER_OF_MTP, list(experts(d, LAYER_OF_MTP))),
    ]


MTP = Root("mtp_block/mtp_layer_{layers}/mtp_{layers}", DECODER.name)
LAYER_OF_MTP = Root(f"{MTP.path}_transformer_layer", DECODER.name)


def latent_attention(d: DeepSeekDims, root: Root) -> Iterator[Row]:
    """Multi-head latent attention: queries, keys and values from low-rank projections."""
    at, qk = "self_attention", d.nope + d.rope
    if d.q_lora:
        down, up = "embed_attn q_lora_up_proj", "q_lora q_heads kv"
        yield projection(f"{at}/wq_a", down, "self_attn.q_a_proj", d.emb, d.q_lora, root=root)
        yield norm(f"{at}/q_norm", "self_attn.q_a_layernorm", d.q_lora, root=root)
        yield projection(f"{at}/wq_b", up, "self_attn.q_b_proj", d.q_lora, d.heads, qk, root=root)
    else:
        axes = "embed_attn q_heads kv"
        yield projection(f"{at}/query", axes, "self_attn.q_proj", d.emb, d.heads, qk, root=root)
    down, up = "embed_attn kv_lora_up_proj", "kv_lora kv_heads kv_head_dim"
    width, name = d.kv_lora + d.rope, "self_attn.kv_a_proj_with_mqa"
    yield projection(f"{at}/wkv_a", down, name, d.emb, width, root=root)
    yield norm(f"{at}/kv_norm", "self_attn.kv_a_layernorm", d.kv_lora, root=root)
    width, name = d.nope + d.head_dim, "self_attn.kv_b_proj"
    yield projection(f"{at}/wkv_b", up, name, d.kv_lora, d.heads, width, root=root)
    yield from attention(d, parts="", root=root)


def experts(d: DeepSeekDims, root: Root) -> Iterator[Row]:
    """A router and its experts, and the shared experts as one MLP."""
    at = "DeepSeekMoeBlock_0"
    yield from routed_experts(d, f"{at}/MoeBlock_0", "mlp", root=root, axis="embed_router")
    wide = replace(d, mlp=d.shared * d.moe_mlp)
    yield from gated_mlp(wide, f"{at}/shared_experts", root, "mlp.shared_experts")


def routed_bias(d: DeepSeekDims, root: Root) -> Row:
    """The bias that balances the load of experts; MaxText has it in a separate collection."""
    bias = hf(f"{root.name}.mlp.gate.e_score_correction_bias") >> rearrange("x -> x", x=d.experts)
    return row(f"{root.path}/DeepSeekMoeBlock_0/MoeBlock_0/gate/bias", "-", bias, stack=0)


def indexer(d: IndexerDims, root: Root) -> Iterator[Row]:
    at, name = "self_attention/indexer", "self_attn.indexer"
    n, width = d.index_heads, d.index_dim
    up = "q_lora q_heads kv"
    yield projection(f"{at}/wq_b", up, f"{name}.wq_b", d.q_lora, n, width, root=root)
    yield projection(f"{at}/wk", "embed_attn kv", f"{name}.wk", d.emb, width, root=root)
    heads = "embed_attn q_heads"
    yield projection(f"{at}/weights_proj", heads, f"{name}.weights_proj", d.emb, n, root=root)
    yield norm(f"{at}/k_norm", f"{name}.k_norm", width, root=root, axis="-")
    bias = hf(f"{root.name}.{name}.k_norm.bias") >> rearrange("n -> n", n=width)
    yield row(f"{root.path}/{at}/k_norm/bias", "-", bias)


def prediction(d: DeepSeekDims) -> Iterator[Row]:
    """The input projection and norms of a layer for multi-token prediction, and its final norm."""
    for part, name in (
        ("embedding_norm", "enorm"),
        ("hidden_state_norm", "hnorm"),
        ("final_norm", "shared_head.norm"),
    ):
        scale = hf(f"{MTP.name}.{name}.weight") >> rearrange("e -> e", e=d.emb)
        yield row(f"{MTP.path}_{part}/scale", "norm", scale)
    both = hf(f"{MTP.name}.eh_proj.weight") >> rearrange("o i -> i o", o=d.emb, i=2 * d.emb)
    yield row(f"{MTP.path}_projection/kernel", "embed -", both)


# Tensors that multi-token prediction shares with the decoder.
IGNORED = (
    "model.layers.*.embed_tokens.weight",
    "model.layers.*.shared_head.head.weight",
)

V2 = Computation(
    settings=(
        epsilon(),
        activation(),
        chosen_experts(6),
        Setting("routed_scaling_factor", ("routed_scaling_factor",), 1.0),
        Setting("routed_score_func", ("scoring_func",), "softmax"),
    ),
    fixed=(
        Fixed(("topk_method",), "greedy", lambda d, name: "greedy"),
        Fixed(("norm_topk_prob",), False, lambda d, name: False),
    ),
    rope=rope.latent,
    turned=lambda d, attention: d.rope,
)
V3 = Computation(
    settings=(
        epsilon(),
        activation(),
        chosen_experts(8),
        Setting("routed_scaling_factor", ("routed_scaling_factor",), 2.5),
        Setting("routed_score_func", ("scoring_func",), "sigmoid"),
        Setting("n_routing_groups", ("n_group",), 8, or_none),
        Setting("topk_routing_group", ("topk_group",), 4, or_none),
    ),
    fixed=(normalized_experts(True),),
    rope=rope.latent,
    turned=lambda d, attention: d.rope,
)

# Kimi K2.5: DeepSeek V3 in other sizes, as Kimi K2 is, and a vision encoder, which MaxText does not
# have. The second name is that of transformers.
KIMI_K25 = ("KimiK25ForConditionalGeneration", "Kimi_K25ForConditionalGeneration")

DEEPSEEK_V2 = Family(
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    decoder_block="deepseek",
    rows=v2_rows,
    sizes=DeepSeekDims,
    computes=V2,
    ignored=IGNORED,
    predicts=".eh_proj.weight",
    split_experts=FUSED,
)
DEEPSEEK_V3 = Family(
    architectures=("DeepseekV3ForCausalLM", *KIMI_K25),
    model_types=("deepseek_v3", "kimi_k2", "kimi_k25"),
    decoder_block="deepseek",
    rows=v3_rows,
    sizes=DeepSeekDims,
    computes=V3,
    names=(("language_model.", ""), ("model.language_model.", "model.")),  # of Kimi K2.5
    in_memory=(
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
    ignored=(*IGNORED, "vision_tower.*", "mm_projector.*", "model.vision_*", "model.mm_*"),
    predicts=".eh_proj.weight",
    split_experts=FUSED,
)
DEEPSEEK_V32 = Family(
    architectures=("DeepseekV32ForCausalLM",),
    model_types=("deepseek_v32",),
    decoder_block="deepseek",
    rows=v32_rows,
    sizes=IndexerDims,
    computes=replace(V3, settings=(*V3.settings, Setting("indexer_topk", ("index_topk",), 2048))),
    ignored=IGNORED,
    predicts=".eh_proj.weight",
    split_experts=FUSED,
)
