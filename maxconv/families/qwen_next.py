"""Qwen3-Next: three layers of gated delta nets, then one of gated attention; all are MoE layers.

transformers modeling_qwen3_next.py; MaxText models/qwen3.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from maxconv.algebra import Expr, hf, rearrange
from maxconv.families import rope
from maxconv.families.blocks import FUSED, LAYER, ends, gated_mlp, norm, projection, routed_experts
from maxconv.families.dims import MOST_LAYERS, size
from maxconv.families.qwen import ExpertsOnly
from maxconv.families.settings import (
    Computation,
    activation,
    chosen_experts,
    epsilon,
    normalized_experts,
)
from maxconv.families.table import Family, Layers, Row, each, row

ATTENTION = "decoder/{layers}/attention"


@dataclass(frozen=True, kw_only=True)
class HybridDims(ExpertsOnly):
    """`cycle`: number of layers per layer with full attention. Delta nets have own head sizes."""

    cycle: int = size(
        "full_attention_interval",
        maxtext="inhomogeneous_layer_cycle_interval",
        default=4,
        most=MOST_LAYERS,
    )
    conv: int = size("linear_conv_kernel_dim", maxtext="gdn_conv_kernel_dim")
    delta_keys: int = size("linear_num_key_heads", maxtext="gdn_num_key_heads")
    delta_values: int = size("linear_num_value_heads", maxtext="gdn_num_value_heads")
    key_dim: int = size("linear_key_head_dim", maxtext="gdn_key_head_dim")
    value_dim: int = size("linear_value_head_dim", maxtext="gdn_value_head_dim")


def rows(d: HybridDims):
    yield from ends(d)
    local, full = local_and_global(d.layers, d.cycle)
    qkvz, ba = (hf(f"{LAYER}.linear_attn.in_proj_{part}.weight") for part in ("qkvz", "ba"))
    inwards = rearrange("o e -> e o", e=d.emb)
    experts = routed_experts(d, "mlp/routed_experts", "mlp")
    layer = (*norms(d), *shared_expert(d), *experts)
    yield from each(local, layer, delta_net(d, qkvz >> inwards, ba >> inwards))
    yield from each(full, layer, gated_attention(d))


def local_and_global(count: int, n: int) -> tuple[Layers, Layers]:
    """The last of every `n` layers has full attention; the others are stacked within a block."""
    blocks = [range(start, min(start + n, count)) for start in range(0, count, n)]
    local = tuple(tuple(block[: n - 1]) for block in blocks)
    full = tuple(range(n - 1, count, n))
    return (
        Layers(
            (("layers/local_layers", local),),
            tuple((f"layers_{i}", i) for block in local for i in block),
            ("layers", "local_layers"),
        ),
        Layers((("layers/global_layer", full),), tuple((f"layers_{i}", i) for i in full)),
    )


def norms(d: HybridDims) -> Iterator[Row]:
    """The norms before attention and before the experts. MaxText does not name their axes."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield norm(name, name, d.emb, axis="-")


def shared_expert(d: HybridDims) -> Iterator[Row]:
    """The shared expert and its gate."""
    yield from gated_mlp(d, "mlp/shared_expert", name="mlp.shared_expert")
    yield projection("mlp/shared_expert_gate", "embed -", "mlp.shared_expert_gate", d.emb, 1)


def delta_net(d: HybridDims, qkvz: Expr, ba: Expr) -> Iterator[Row]:
    """A gated delta net; `qkvz`, `ba`: its input kernels, (emb, ...), for each key head in turn."""
    name = f"{LAYER}.linear_attn"
    keys, values = d.delta_keys * d.key_dim, d.delta_values * d.value_dim
    widths = rearrange("e o -> e o", o=2 * (keys + values))
    yield row(f"{ATTENTION}/in_proj_qkvz/kernel", "embed_attn gdn_head", qkvz >> widths)
    widths = rearrange("e o -> e o", o=2 * d.delta_values)
    yield row(f"{ATTENTION}/in_proj_ba/kernel", "embed_attn gdn_head", ba >> widths)
    conv = rearrange("c 1 k -> k 1 c", c=2 * keys + values, k=d.conv)
    yield row(f"{ATTENTION}/conv1d/kernel", "- - -", hf(f"{name}.conv1d.weight") >> conv)
    for part in ("A_log", "dt_bias"):
        of_heads = rearrange("h -> h", h=d.delta_values)
        yield row(f"{ATTENTION}/{part}", "-", hf(f"{name}.{part}") >> of_heads)
    yield norm("attention/norm/rms_norm", "linear_attn.norm", d.value_dim, axis="-")
    axes, out = "gdn_head embed_attn", "linear_attn.out_proj"
    yield projection("attention/out_proj", axes, out, values, d.emb)


def gated_attention(d: HybridDims) -> Iterator[Row]:
    """Attention with an output gate, which is part of the query projection."""
    at = "attention/attention"
    for part, short, heads, width, axes in (
        ("query", "q", d.heads, 2 * d.head_dim, "q_heads kv"),
        ("key", "k", d.kv_heads, d.head_dim, "kv_heads kv_head_dim"),
        ("value", "v", d.kv_heads, d.head_dim, "kv_heads kv_head_dim"),
    ):
        name = f"self_attn.{short}_proj"
        yield projection(f"{at}/{part}", f"embed_attn {axes}", name, d.emb, heads, width)
    width = d.heads * d.head_dim
    yield projection(f"{at}/out", "mlp embed_attn", "self_attn.o_proj", width, d.emb)
    yield norm(f"{at}/query_norm", "self_attn.q_norm", d.head_dim, axis="-")
    yield norm(f"{at}/key_norm", "self_attn.k_norm", d.head_dim, axis="-")


QWEN3_NEXT = Family(
    architectures=("Qwen3NextForCausalLM",),
    model_types=("qwen3_next",),
    decoder_block="qwen3_next",
    rows=rows,
    sizes=HybridDims,
    computes=Computation(
        settings=(epsilon(), activation(), chosen_experts(10)),
        fixed=(normalized_experts(True),),
        rope=rope.partial,
        default_part=0.25,
    ),
    ignored=("mtp.*",),
    split_experts=FUSED,
)
