"""Mistral. transformers modeling_mistral.py; MaxText models/mistral.py.

Unlike its llama, MaxText's mistral applies RoPE to the halves of a head, as transformers does.
"""

from maxconv.families.blocks import attention, ends, gated_mlp, pre_norms, query_scale
from maxconv.families.dims import Dims
from maxconv.families.settings import Computation, no_window
from maxconv.families.table import Family, each, uniform


def rows(d: Dims):
    attn = attention(d, query=(query_scale(d.head_dim),))
    return (*ends(d), *each(uniform(d.layers), pre_norms(d), attn, gated_mlp(d)))


MISTRAL = Family(
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    decoder_block="mistral",
    rows=rows,
    computes=Computation(fixed=(no_window(4096),)),
)
