"""DeepSeek V4: compressed attention, hyper-connections, hash-routed experts in the first layers.

DeepSeek's own inference/model.py, which has the names of published checkpoints; MaxText
models/deepseek4.py, layers/attention_compressed.py, layers/mhc.py, layers/moe.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from maxconv.algebra import Fill, Slice, fit, hf, rearrange
from maxconv.families.blocks import DECODER, ends, gated_mlp, norm, projection, routed_experts
from maxconv.families.dims import MOST_EXPERTS, MOST_LAYERS, Dims, size
from maxconv.families.settings import (
    Computation,
    Setting,
    chosen_experts,
    epsilon,
    normalized_experts,
    window,
)
from maxconv.families.table import Family, Layers, Row, each, row

AT, NAME = DECODER
PARTS = ("w1", "w3", "w2")  # gate, up and down


@dataclass(frozen=True, kw_only=True)
class DeepSeek4Dims(Dims):
    """The first `hashed` layers select `chosen` experts by the token id alone.

    `streams`: residual streams, which hyper-connections mix. `groups`: of the output projection of
    attention, each to `o_lora`.
    """

    mlp: int = size("moe_intermediate_size", maxtext="base_mlp_dim")
    experts: int = size("n_routed_experts", maxtext="num_experts", most=MOST_EXPERTS)
    chosen: int = size("num_experts_per_tok")
    shared: int = size("n_shared_experts", maxtext="shared_experts")
    mlp_kinds: list = size("mlp_layer_types", default=[])
    hashed: int = size(
        "num_hash_layers",
        maxtext="first_num_hash_layers",
        default=lambda d: d["mlp_kinds"].count("hash_moe") or 3,
        most=MOST_LAYERS,
    )
    streams: int = size("hc_mult", maxtext="mhc_expansion_rate")
    q_lora: int = size("q_lora_rank", maxtext="q_lora_rank")
    o_lora: int = size("o_lora_rank", maxtext="o_lora_rank")
    groups: int = size("o_groups", maxtext="o_groups")
    index_heads: int = size("index_n_heads", maxtext="indexer_n_heads")
    index_dim: int = size("index_head_dim", maxtext="indexer_head_dim")


def rows(d: DeepSeek4Dims) -> Iterator[Row]:
    """From the third layer on, layers with light and heavy compression alternate."""
    yield from ends(d)
    yield from head(d)
    hashed = min(d.hashed, d.layers)
    first = alone(range(hashed))
    turns = [in_turn(range(hashed + k, d.layers, 2), k) for k in range(2)]
    for layers in (first, *turns):
        yield from each(layers, norms(d), attention(d), experts(d))
        yield from each(layers, hyper_connection(d, "attn", "mhc_attention"))
        yield from each(layers, hyper_connection(d, "ffn", "mhc_mlp"))
    yield from each(first, [hash_table(d)])
    for k, layers in enumerate(turns):
        is_even = (hashed + k) % 2 == 0
        yield from each(layers, [routed_bias(d)])
        yield from each(layers, sparse(d) if is_even else compressor(d, "hca_compressor"))
    yield from each(alone(range(2, hashed, 2)), sparse(d))
    yield from each(alone(range(3, hashed, 2)), compressor(d, "hca_compressor"))


def alone(numbers: Iterable[int]) -> Layers:
    """Layers that are never stacked."""
    one_by_one = tuple((f"layers_{i}", i) for i in numbers)
    return Layers(one_by_one, one_by_one)


def in_turn(numbers: Iterable[int], k: int) -> Layers:
    """Every other layer."""
    stacked = ((f"scanned_blocks/layers_{k}", tuple(numbers)),)
    return Layers(stacked, alone(numbers).unscanned, ("scanned_blocks",))


def head(d: DeepSeek4Dims) -> Iterator[Row]:
    """The final mixing of all streams into one."""
    k = d.streams
    mix = hf("hc_head_fn") >> rearrange("o i -> i o", o=k, i=k * d.emb)
    yield row("decoder/hc_head/hc_fn", "activation_embed -", mix)
    yield row("decoder/hc_head/hc_base", "-", hf("hc_head_base") >> rearrange("k -> k", k=k))
    yield row("decoder/hc_head/hc_scale", "-", hf("hc_head_scale") >> rearrange("n -> n", n=1))


def norms(d: DeepSeek4Dims) -> Iterator[Row]:
    yield norm("pre_self_attention_layer_norm", "attn_norm", d.emb)
    yield norm("post_self_attention_layer_norm", "ffn_norm", d.emb)


def hyper_connection(d: DeepSeek4Dims, name: str, at: str) -> Iterator[Row]:
    """The mixing of streams before, after and around attention or MLP: parts of three tensors.

    MaxText's norm has a scale, the checkpoint none.
    """
    k, at, name = d.streams, f"{AT}/{at}", f"{NAME}.hc_{name}"
    mixed = k + k + k * k  # what the three parts have together
    yield row(f"{at}/mhc_norm/scale", "norm", Fill((k * d.emb,), 1.0), dtype="float32")
    for i, (part, n) in enumerate((("pre", k), ("post", k), ("res", k * k))):
        cut = Slice(0, i * k, n)
        alpha = hf(f"{name}_fn") >> rearrange("o i -> o i", o=mixed, i=k * d.emb) >> cut
        yield row(f"{at}/{part}_alpha", "activation_embed -", alpha >> rearrange("o i -> i o"))
        beta = hf(f"{name}_base") >> rearrange("o -> o", o=mixed) >> cut
        square = "-"
        if n == k * k:
            beta, square = beta >> rearrange("(a b) -> a b", a=k, b=k), "- -"
        yield row(f"{at}/{part}_beta", square, beta)
        factor = hf(f"{name}_scale") >> rearrange("n -> n", n=3) >> Slice(0, i, 1)
        yield row(f"{at}/{part}_alpha_scale", "-", factor)


def attention(d: DeepSeek4Dims) -> Iterator[Row]:
    """Attention with low-rank queries, shared keys and values, and a grouped output projection."""
    at, n = "self_attention", d.heads * d.head_dim // d.groups
    yield projection(f"{at}/wq_a", "embed_attn q_lora", "attn.wq_a", d.emb, d.q_lora)
    yield norm(f"{at}/q_norm", "attn.q_norm", d.q_lora)
    up = "q_lora q_heads kv"
    yield projection(f"{at}/wq_b", up, "attn.wq_b", d.q_lora, d.heads, d.head_dim)
    both = "embed_attn kv_heads kv_head_dim"
    yield projection(f"{at}/wkv", both, "attn.wkv", d.emb, d.kv_heads, d.head_dim)
    yield norm(f"{at}/kv_norm", "attn.kv_norm", d.head_dim)
    sinks = hf(f"{NAME}.attn.attn_sink") >> rearrange("h -> h", h=d.heads)
    yield row(f"{AT}/{at}/sinks", "-", sinks)
    apart = rearrange("(g r) n -> g n r", g=d.groups, r=d.o_lora, n=n)
    down = hf(f"{NAME}.attn.wo_a.weight") >> apart
    yield row(f"{AT}/{at}/o_a_proj/kernel", "o_groups q_heads o_lora_up_proj", down)
    out = "o_lora_up_proj embed_attn"
    yield projection(f"{at}/o_b_proj", out, "attn.wo_b", d.groups * d.o_lora, d.emb)


def compressor(
    d: DeepSeek4Dims, at: str, name: str = "attn", width: int = 0, windows: int = 1
) -> Iterator[Row]:
    """The compressor of several tokens into one key of `width`, with overlapping `windows`."""
    at, name, width = f"self_attention/{at}", f"{name}.compressor", width or d.head_dim
    n = windows * width
    yield projection(f"{at}/gate_proj", "embed_attn kv", f"{name}.wgate", d.emb, n)
    yield projection(f"{at}/kv_proj", "embed_attn kv", f"{name}.wkv", d.emb, n)
    yield norm(f"{at}/kv_norm", f"{name}.norm", width)
    positions = hf(f"{NAME}.{name}.ape") >> rearrange("t n -> t n", n=n)
    yield row(f"{AT}/{at}/position_bias", "- -", positions)


def sparse(d: DeepSeek4Dims) -> Iterator[Row]:
    """Compressed keys, and an indexer that selects among them."""
    at, name = "csa_compressor", "attn.indexer"
    yield from compressor(d, at, windows=2)
    yield from compressor(d, f"{at}/indexer", name, d.index_dim, windows=2)
    at, width = f"self_attention/{at}/indexer", d.index_heads * d.index_dim
    weights = "embed_attn indexer_weights"
    yield projection(f"{at}/weights_proj", weights, f"{name}.weights_proj", d.emb, d.index_heads)
    yield projection(f"{at}/q_proj", "q_lora indexer_q", f"{name}.wq_b", d.q_lora, width)


def experts(d: DeepSeek4Dims) -> Iterator[Row]:
    """A router and its experts, and the shared experts as one MLP."""
    yield from routed_experts(d, "mlp/MoeBlock_0", "ffn", PARTS, axis="embed_router")
    wide = replace(d, mlp=d.shared * d.moe_mlp)
    yield from gated_mlp(wide, "mlp/shared_experts", name="ffn.shared_experts", parts=PARTS)


def routed_bias(d: DeepSeek4Dims) -> Row:
    """The bias that balances the load of experts; MaxText has it in a separate collection."""
    bias = hf(f"{NAME}.ffn.gate.bias") >> rearrange("x -> x", x=d.experts)
    return row(f"{AT}/mlp/MoeBlock_0/gate/bias", "-", bias, stack=0)


def hash_table(d: DeepSeek4Dims) -> Row:
    """The experts of each token id, in a separate collection; rounded to bfloat16 by MaxText."""
    table = hf(f"{NAME}.ffn.gate.tid2eid") >> fit(0, d.vocab) >> rearrange("v k -> v k", k=d.chosen)
    return row(f"{AT}/mlp/MoeBlock_0/tid2eid", "- -", table, dtype="int32")


DEEPSEEK_V4 = Family(
    architectures=("DeepseekV4ForCausalLM",),
    model_types=("deepseek_v4",),
    decoder_block="deepseek4",
    rows=rows,
    sizes=DeepSeek4Dims,
    computes=Computation(
        settings=(
            epsilon(),
            chosen_experts(6),
            window(128),
            Setting("mlp_activations_limit", ("swiglu_limit",), 10.0),
            Setting("routed_scaling_factor", ("routed_scaling_factor",), 1.5),
            Setting("routed_score_func", ("scoring_func",), "sqrtsoftplus"),
            Setting("indexer_topk", ("index_topk",), 512),
        ),
        fixed=(normalized_experts(True),),
        rope=None,
    ),
    names=(
        ("embed.", "model.embed_tokens."),
        ("layers.", "model.layers."),
        ("norm.", "model.norm."),
        ("head.", "lm_head."),
        # transformers 5.23 does not restore all of the original names
        ("model.layers.*.attn.norm.", "model.layers.*.attn.kv_norm."),
        ("model.hc_head.hc_", "hc_head_"),
    ),
    in_memory=None,
    ignored=("mtp.*",),
    pads_vocab=True,
)
