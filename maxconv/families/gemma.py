"""Gemma 2. transformers modeling_gemma2.py; MaxText models/gemma2.py.

MaxText's norms multiply by their scale, transformers' by one more: these scales are float32, like
the sum. Its embedding is not scaled when it is looked up, so the table is.
"""

import math

import numpy as np

from maxconv.algebra import scale, shift
from maxconv.families.blocks import attention, ends, gated_mlp, norm, query_scale
from maxconv.families.table import Dims, Family, each, pairs

PLUS_ONE = (shift(1),)


def gemma2_rows(d: Dims):
    table = scale(float(np.float32(math.sqrt(d.emb))))
    yield from ends(d, embedding=(table,), norm=PLUS_ONE, norm_dtype="float32")
    for kind, layers in zip(("local", "global"), pairs(d.layers), strict=True):
        attn = attention(d, query=(query_scale(d.head_dim),), at=f"self_attention_{kind}")
        yield from each(layers, norms(d, kind), attn, gated_mlp(d, at=f"mlp_{kind}"))


def norms(d: Dims, kind: str):
    """Before and after attention and MLP."""
    for path, name in (
        ("pre_self_attention_norm", "input_layernorm"),
        ("post_self_attention_norm", "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ):
        yield norm(f"{path}_{kind}", name, d.emb, PLUS_ONE, "float32")


GEMMA2 = Family(
    architectures=("Gemma2ForCausalLM",),
    decoder_block="gemma2",
    rows=gemma2_rows,
    pads_vocab=True,
    layers_per_block=2,
)
