"""Mistral. transformers modeling_mistral.py; MaxText models/mistral.py."""

from maxconv.families import llama
from maxconv.families.table import Family

MISTRAL = Family(
    architectures=("MistralForCausalLM",),
    decoder_block="mistral",
    rows=llama.rows,
    ignored=llama.LLAMA.ignored,
)
