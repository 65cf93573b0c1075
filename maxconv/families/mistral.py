"""Mistral. transformers modeling_mistral.py; MaxText models/mistral.py.

Unlike its llama, MaxText's mistral rotates the halves of a head, as transformers does.
"""

from maxconv.families.blocks import attention, ends, gated_mlp, pre_norms, query_scale
from maxconv.families.table import Dims, Family


def rows(d: Dims):
    return (
        *ends(d),
        *pre_norms(d),
        *attention(d, query=(query_scale(d.head_dim),)),
        *gated_mlp(d),
    )


MISTRAL = Family(
    architectures=("MistralForCausalLM",),
    decoder_block="mistral",
    rows=rows,
    ignored=("model.layers.*.self_attn.rotary_emb.inv_freq",),
)
