"""Llama, of every size. transformers modeling_llama.py; MaxText models/llama2.py."""

from maxconv.families import rope
from maxconv.families.blocks import (
    ROPE_PAIRS,
    attention,
    ends,
    gated_mlp,
    pre_norms,
    query_scale,
)
from maxconv.families.dims import Dims
from maxconv.families.settings import Computation
from maxconv.families.table import Family, each, uniform


def rows(d: Dims):
    attn = attention(d, query=(ROPE_PAIRS, query_scale(d.head_dim)), key=(ROPE_PAIRS,))
    return (*ends(d), *each(uniform(d.layers), pre_norms(d), attn, gated_mlp(d)))


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    decoder_block="llama2",
    rows=rows,
    computes=Computation(rope=rope.pairs, names=False),
)
