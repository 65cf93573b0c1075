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


def ends(d: Dims) -> Iterator[Row]:
    """Embedding table, final norm, and the head unless it is tied."""
    yield row("token_embedder/embedding", "vocab embed_vocab", _vocab_rows("model.embed_tokens", d))
    yield row("decoder/decoder_norm/scale", "norm", hf("model.norm.weight"))
    if not d.tied:
        head = _vocab_rows("lm_head", d) >> rearrange("v e -> e v")
        yield row("decoder/logits_dense/kernel", "embed_vocab vocab", head)


def _vocab_rows(module: str, d: Dims):
    return hf(f"{module}.weight") >> fit(0, d.vocab)


def norm(path: str, name: str, layer: str = LAYER) -> Row:
    """The scale of a norm of each layer."""
    return row(f"decoder/{{layers}}/{path}/scale", "norm", hf(f"{layer}.{name}.weight"))


def pre_norms() -> Iterator[Row]:
    """The norms before attention and before the MLP."""
    yield norm("pre_self_attention_layer_norm", "input_layernorm")
    yield norm("post_self_attention_layer_norm", "post_attention_layernorm")


def attention(d: Dims, query: Ops = (), key: Ops = (), bias: bool = False) -> Iterator[Row]:
    """Grouped-query attention; `query`, `key`: ops on those kernels, (emb, heads, head_dim)."""
    at, name = "decoder/{layers}/self_attention", f"{LAYER}.self_attn"
    for part, short, heads, axes, ops in (
        ("query", "q", d.heads, "q_heads kv", query),
        ("key", "k", d.kv_heads, "kv_heads kv_head_dim", key),
        ("value", "v", d.kv_heads, "kv_heads kv_head_dim", ()),
    ):
        kernel = hf(f"{name}.{short}_proj.weight") >> rearrange("(h d) e -> e h d", h=heads)
        yield row(f"{at}/{part}/kernel", f"embed_attn {axes}", kernel >> ops)
        if bias:
            of_heads = hf(f"{name}.{short}_proj.bias") >> rearrange("(h d) -> h d", h=heads)
            yield row(f"{at}/{part}/bias", axes, of_heads)
    out = hf(f"{name}.o_proj.weight") >> rearrange("e (h d) -> h d e", h=d.heads)
    yield row(f"{at}/out/kernel", "heads kv embed_attn", out)


def qk_norms() -> Iterator[Row]:
    """The norms of queries and keys, one scale for all heads."""
    yield norm("self_attention/query_norm", "self_attn.q_norm")
    yield norm("self_attention/key_norm", "self_attn.k_norm")


def gated_mlp() -> Iterator[Row]:
    """gate, up and down projections."""
    at, name = "decoder/{layers}/mlp", f"{LAYER}.mlp"
    transposed = rearrange("o i -> i o")
    yield row(f"{at}/wi_0/kernel", "embed mlp", hf(f"{name}.gate_proj.weight") >> transposed)
    yield row(f"{at}/wi_1/kernel", "embed mlp", hf(f"{name}.up_proj.weight") >> transposed)
    yield row(f"{at}/wo/kernel", "mlp embed", hf(f"{name}.down_proj.weight") >> transposed)
