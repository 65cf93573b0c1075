"""The pieces that decoders are made of, each written once.

Logical axis names are MaxText 0.2.5's (layers/attentions.py, linears.py, embeddings.py,
normalizations.py); tensor names are those of transformers' modeling files.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from maxconv.algebra import Op, Pattern, fit, hf, rearrange, scale
from maxconv.families.table import Dims, Row, row

Ops = Sequence[Op | Pattern]

LAYER = "model.layers.{l}"

# HF rotates the halves of a head against each other, MaxText's llama neighbours in pairs.
ROPE_PAIRS = rearrange("e h (t d) -> e h (d t)", t=2)


def query_scale(head_dim: int) -> Op:
    """1/sqrt(head_dim) in float32: MaxText's decoder does not scale its queries itself."""
    return scale(float(np.float32(1 / math.sqrt(head_dim))))


def ends(
    d: Dims, embedding: Ops = (), norm: Ops = (), norm_dtype: str | None = None
) -> Iterator[Row]:
    """Embedding table, final norm, and the head unless it is tied; ops on the first two."""
    table = hf("model.embed_tokens.weight") >> fit(0, d.vocab) >> embedding
    yield row("token_embedder/embedding", "vocab embed_vocab", table)
    final = hf("model.norm.weight") >> rearrange("e -> e", e=d.emb) >> norm
    yield row("decoder/decoder_norm/scale", "norm", final, dtype=norm_dtype)
    if not d.tied:
        head = hf("lm_head.weight") >> fit(0, d.vocab) >> rearrange("v e -> e v", e=d.emb)
        yield row("decoder/logits_dense/kernel", "embed_vocab vocab", head)


def norm(path: str, name: str, n: int, ops: Ops = (), dtype: str | None = None) -> Row:
    """The scale, (n,), of a norm of each layer."""
    weight = hf(f"{LAYER}.{name}.weight") >> rearrange("n -> n", n=n) >> ops
    return row(f"decoder/{{layers}}/{path}/scale", "norm", weight, dtype=dtype)


def pre_norms(d: Dims) -> Iterator[Row]:
    """The norms before attention and before the MLP."""
    yield norm("pre_self_attention_layer_norm", "input_layernorm", d.emb)
    yield norm("post_self_attention_layer_norm", "post_attention_layernorm", d.emb)


def attention(
    d: Dims, query: Ops = (), key: Ops = (), bias: bool = False, at: str = "self_attention"
) -> Iterator[Row]:
    """Grouped-query attention; `query`, `key`: ops on those kernels, (emb, heads, head_dim)."""
    at, name = f"decoder/{{layers}}/{at}", f"{LAYER}.self_attn"
    for part, short, heads, axes, ops in (
        ("query", "q", d.heads, "q_heads kv", query),
        ("key", "k", d.kv_heads, "kv_heads kv_head_dim", key),
        ("value", "v", d.kv_heads, "kv_heads kv_head_dim", ()),
    ):
        sizes = {"h": heads, "d": d.head_dim}
        split = rearrange("(h d) e -> e h d", e=d.emb, **sizes)
        kernel = hf(f"{name}.{short}_proj.weight") >> split >> ops
        yield row(f"{at}/{part}/kernel", f"embed_attn {axes}", kernel)
        if bias:
            of_heads = hf(f"{name}.{short}_proj.bias") >> rearrange("(h d) -> h d", **sizes)
            yield row(f"{at}/{part}/bias", axes, of_heads)
    merge = rearrange("e (h d) -> h d e", e=d.emb, h=d.heads, d=d.head_dim)
    yield row(f"{at}/out/kernel", "heads kv embed_attn", hf(f"{name}.o_proj.weight") >> merge)


def qk_norms(d: Dims) -> Iterator[Row]:
    """The norms of queries and keys, one scale for all heads."""
    yield norm("self_attention/query_norm", "self_attn.q_norm", d.head_dim)
    yield norm("self_attention/key_norm", "self_attn.k_norm", d.head_dim)


def gated_mlp(d: Dims, at: str = "mlp") -> Iterator[Row]:
    """gate, up and down projections."""
    at, name = f"decoder/{{layers}}/{at}", f"{LAYER}.mlp"
    inwards = rearrange("m e -> e m", m=d.mlp, e=d.emb)
    outwards = rearrange("e m -> m e", m=d.mlp, e=d.emb)
    yield row(f"{at}/wi_0/kernel", "embed mlp", hf(f"{name}.gate_proj.weight") >> inwards)
    yield row(f"{at}/wi_1/kernel", "embed mlp", hf(f"{name}.up_proj.weight") >> inwards)
    yield row(f"{at}/wo/kernel", "mlp embed", hf(f"{name}.down_proj.weight") >> outwards)


def routed_experts(
    d: Dims, at: str, name: str, parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Iterator[Row]:
    """A router and its experts, each a gated MLP; `parts` are the names of gate, up and down."""
    at, name = f"decoder/{{layers}}/{at}", f"{LAYER}.{name}"
    router = hf(f"{name}.gate.weight") >> rearrange("x e -> e x", x=d.experts, e=d.emb)
    yield row(f"{at}/gate/kernel", "embed -", router)
    gate, up, down = (hf(f"{name}.experts.{{e}}.{part}.weight") for part in parts)
    inwards = rearrange("m e -> e m", m=d.moe_mlp, e=d.emb)
    outwards = rearrange("e m -> m e", m=d.moe_mlp, e=d.emb)
    yield row(f"{at}/wi_0", "exp embed_moe mlp_moe", gate >> inwards, d.experts)
    yield row(f"{at}/wi_1", "exp embed_moe mlp_moe", up >> inwards, d.experts)
    yield row(f"{at}/wo", "exp mlp_moe embed_moe", down >> outwards, d.experts)
