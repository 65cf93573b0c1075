"""The building blocks of decoders.

Logical axis names are MaxText 0.2.5's (layers/attentions.py, linears.py, embeddings.py,
normalizations.py); tensor names are those of transformers' modeling files.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from maxconv.algebra import Op, Pattern, Slice, fit, hf, rearrange, scale
from maxconv.families.dims import Dims
from maxconv.families.table import Row, row

Ops = Sequence[Op | Pattern]

LAYER = "model.layers.{l}"


class Root(NamedTuple):
    """Where layers are: their path in MaxText's tree, and the prefix of their tensor names."""

    path: str
    name: str


DECODER = Root("decoder/{layers}", LAYER)

GATED = ("gate_proj", "up_proj", "down_proj")

# For `fuse_experts` and `split_experts`: name suffixes of fused tensors and of those per expert.
FUSED = (
    (".experts.gate_up_proj", (".experts.{e}.gate_proj.weight", ".experts.{e}.up_proj.weight")),
    (".experts.down_proj", (".experts.{e}.down_proj.weight",)),
)

# HF's RoPE rotates the first half of a head with the second, MaxText's llama adjacent pairs.
ROPE_PAIRS = rearrange("e h (t d) -> e h (d t)", t=2)


def query_scale(head_dim: int) -> Op:
    """1/sqrt(head_dim), folded into the kernel: MaxText's decoder does not scale queries."""
    return scale(1 / math.sqrt(head_dim))


def ends(
    d: Dims, embedding: Ops = (), norm: Ops = (), norm_dtype: str | None = None
) -> Iterator[Row]:
    """Embedding table, final norm, and output head unless tied; with ops for the first two."""
    table = hf("model.embed_tokens.weight") >> fit(0, d.vocab) >> rearrange("v e -> v e", e=d.emb)
    table = table >> embedding
    yield row("token_embedder/embedding", "vocab embed_vocab", table)
    final = hf("model.norm.weight") >> rearrange("e -> e", e=d.emb) >> norm
    yield row("decoder/decoder_norm/scale", "norm", final, dtype=norm_dtype)
    if not d.tied:
        head = hf("lm_head.weight") >> fit(0, d.vocab) >> rearrange("v e -> e v", e=d.emb)
        yield row("decoder/logits_dense/kernel", "embed_vocab vocab", head)


def norm(
    path: str,
    name: str,
    n: int,
    ops: Ops = (),
    dtype: str | None = None,
    root: Root = DECODER,
    axis: str = "norm",
) -> Row:
    """The scale, (n,), of a norm in each layer."""
    weight = hf(f"{root.name}.{name}.weight") >> rearrange("n -> n", n=n) >> ops
    return row(f"{root.path}/{path}/scale", axis, weight, dtype=dtype)


def projection(path: str, axes: str, name: str, i: int, *o: int, root: Root = DECODER) -> Row:
    """The kernel, (i, *o), of a projection in each layer; `o`: its width, or (heads, head_dim)."""
    weight = hf(f"{root.name}.{name}.weight")
    if len(o) == 1:
        weight = weight >> rearrange("o i -> i o", i=i, o=o[0])
    else:
        weight = weight >> rearrange("(h d) i -> i h d", i=i, h=o[0], d=o[1])
    return row(f"{root.path}/{path}/kernel", axes, weight)


def pre_norms(d: Dims, root: Root = DECODER) -> Iterator[Row]:
    """The norms before attention and before the MLP."""
    yield norm("pre_self_attention_layer_norm", "input_layernorm", d.emb, root=root)
    yield norm("post_self_attention_layer_norm", "post_attention_layernorm", d.emb, root=root)


def attention(
    d: Dims,
    query: Ops = (),
    key: Ops = (),
    bias: bool = False,
    at: str = "self_attention",
    root: Root = DECODER,
    parts: str = "qkv",
    out: str = "o_proj",
) -> Iterator[Row]:
    """Grouped-query attention.

    Args:
        d: the sizes.
        query: ops on the query kernel, (emb, heads, head_dim).
        key: ops on the key kernel, (emb, kv_heads, head_dim).
        bias: whether queries, keys and values have a bias.
        at: path within a layer.
        root: where the layers are.
        parts: which of q, k, v have projections of their own.
        out: the checkpoint's name of the output projection.
    """
    at, name = f"{root.path}/{at}", f"{root.name}.self_attn"
    for part, short, heads, axes, ops in (
        ("query", "q", d.heads, "q_heads kv", query),
        ("key", "k", d.kv_heads, "kv_heads kv_head_dim", key),
        ("value", "v", d.kv_heads, "kv_heads kv_head_dim", ()),
    ):
        if short not in parts:
            continue
        sizes = {"h": heads, "d": d.head_dim}
        split = rearrange("(h d) e -> e h d", e=d.emb, **sizes)
        kernel = hf(f"{name}.{short}_proj.weight") >> split >> ops
        yield row(f"{at}/{part}/kernel", f"embed_attn {axes}", kernel)
        if bias:
            of_heads = hf(f"{name}.{short}_proj.bias") >> rearrange("(h d) -> h d", **sizes)
            yield row(f"{at}/{part}/bias", axes, of_heads)
    merge = rearrange("e (h d) -> h d e", e=d.emb, h=d.heads, d=d.head_dim)
    yield row(f"{at}/out/kernel", "heads kv embed_attn", hf(f"{name}.{out}.weight") >> merge)


def qk_norms(
    d: Dims,
    ops: Ops = (),
    dtype: str | None = None,
    at: str = "self_attention",
    root: Root = DECODER,
    parts: str = "qk",
) -> Iterator[Row]:
    """The norms of queries and keys, one scale for all heads; `parts`: which of q, k have one."""
    for part, short in (("query", "q"), ("key", "k")):
        if short in parts:
            name = f"self_attn.{short}_norm"
            yield norm(f"{at}/{part}_norm", name, d.head_dim, ops, dtype, root)


def gated_mlp(
    d: Dims,
    at: str = "mlp",
    root: Root = DECODER,
    name: str = "mlp",
    parts: tuple[str, str, str] = GATED,
) -> Iterator[Row]:
    """Gate, up and down projections; `parts` are their names in the checkpoint."""
    gate, up, down = (f"{name}.{part}" for part in parts)
    yield projection(f"{at}/wi_0", "embed mlp", gate, d.emb, d.mlp, root=root)
    yield projection(f"{at}/wi_1", "embed mlp", up, d.emb, d.mlp, root=root)
    yield projection(f"{at}/wo", "mlp embed", down, d.mlp, d.emb, root=root)


def router(d: Dims, at: str, name: str, root: Root = DECODER, axis: str = "embed") -> Row:
    """The router of a MoE layer; `axis`: the logical name of its input axis."""
    return projection(f"{at}/gate", f"{axis} -", f"{name}.gate", d.emb, d.experts, root=root)


def fused_experts(d: Dims, at: str, name: str, inwards: str, outwards: str) -> Iterator[Row]:
    """A router and `fused_kernels`."""
    yield router(d, at, name)
    yield from fused_kernels(d, at, f"{name}.experts", inwards, outwards)


def fused_kernels(d: Dims, at: str, name: str, inwards: str, outwards: str) -> Iterator[Row]:
    """Experts in two tensors: gate and up as halves of one, and down.

    `inwards`, `outwards`: the axes of each half, and of down, as stored: x (experts), m (MLP),
    e (embedding).
    """
    at, name = f"decoder/{{layers}}/{at}", f"{LAYER}.{name}"
    sizes = {"x": d.experts, "m": d.moe_mlp, "e": d.emb}
    for i in range(2):
        half = Slice(inwards.split().index("m"), i * d.moe_mlp, d.moe_mlp)
        kernel = hf(f"{name}.gate_up_proj") >> half >> rearrange(f"{inwards} -> x e m", **sizes)
        yield row(f"{at}/wi_{i}", "exp embed_moe mlp_moe", kernel)
    down = hf(f"{name}.down_proj") >> rearrange(f"{outwards} -> x m e", **sizes)
    yield row(f"{at}/wo", "exp mlp_moe embed_moe", down)


def routed_experts(
    d: Dims,
    at: str,
    name: str,
    parts: tuple[str, str, str] = GATED,
    root: Root = DECODER,
    axis: str = "embed",
) -> Iterator[Row]:
    """A router and its experts, each a gated MLP.

    `parts`: names of gate, up and down; `axis`: the logical name of the router's input axis.
    """
    yield router(d, at, name, root, axis)
    at, name = f"{root.path}/{at}", f"{root.name}.{name}"
    gate, up, down = (hf(f"{name}.experts.{{e}}.{part}.weight") for part in parts)
    inwards = rearrange("m e -> e m", m=d.moe_mlp, e=d.emb)
    outwards = rearrange("e m -> m e", m=d.moe_mlp, e=d.emb)
    yield row(f"{at}/wi_0", "exp embed_moe mlp_moe", gate >> inwards, d.experts)
    yield row(f"{at}/wi_1", "exp embed_moe mlp_moe", up >> inwards, d.experts)
    yield row(f"{at}/wo", "exp mlp_moe embed_moe", down >> outwards, d.experts)
