"""Llama, of every size. transformers modeling_llama.py; MaxText models/llama2.py."""

from dataclasses import dataclass

from maxconv.families import rope
from maxconv.families.blocks import (
    ROPE_PAIRS,
    attention,
    ends,
    gated_mlp,
    pre_norms,
    query_scale,
)
from maxconv.families.dims import Dims, size
from maxconv.families.settings import Computation
from maxconv.families.table import Family, each, uniform


@dataclass(frozen=True, kw_only=True)
class LlamaDims(Dims):
    """`rope` is MaxText's rope_type: the default one turns the halves of a head, as transformers
    does, the others pairs of neighbours. Only the default one scales all frequencies alike, which
    is transformers' `scaling` "linear"."""

    scaling: str = size(
        "rope_parameters.rope_type",
        "rope_scaling.rope_type",
        "rope_scaling.type",
        default="default",
    )
    rope: str = size(
        maxtext="rope_type",
        default=lambda d: "default" if d["scaling"] == "linear" else "llama3.1",
    )

    @property
    def in_halves(self) -> bool:
        """Whether queries and keys stay in transformers' order."""
        return self.rope == "default"


def rows(d: LlamaDims):
    order = () if d.in_halves else (ROPE_PAIRS,)
    attn = attention(d, query=(*order, query_scale(d.head_dim)), key=order)
    return (*ends(d), *each(uniform(d.layers), pre_norms(d), attn, gated_mlp(d)))


LLAMA = Family(
    architectures=("LlamaForCausalLM",),
    model_types=("llama",),
    decoder_block="llama2",
    rows=rows,
    sizes=LlamaDims,
    computes=Computation(rope=rope.pairs, in_halves=lambda d: d.in_halves, names=False),
)
