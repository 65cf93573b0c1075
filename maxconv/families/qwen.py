"""Qwen2.5 and dense Qwen3.

transformers modeling_qwen2.py, modeling_qwen3.py; MaxText models/qwen2.py, models/qwen3.py.
"""

from maxconv.families.blocks import attention, ends, gated_mlp, pre_norms, qk_norms
from maxconv.families.table import Dims, Family


def qwen2_rows(d: Dims):
    return (*ends(d), *pre_norms(d), *attention(d, bias=True), *gated_mlp(d))


def qwen3_rows(d: Dims):
    return (*ends(d), *pre_norms(d), *attention(d), *qk_norms(d), *gated_mlp(d))


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",), decoder_block="qwen2", rows=qwen2_rows, pads_vocab=True
)
QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",), decoder_block="qwen3", rows=qwen3_rows, pads_vocab=True
)
