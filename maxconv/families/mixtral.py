"""Mixtral. transformers modeling_mixtral.py; MaxText models/mixtral.py."""

from dataclasses import dataclass

from maxconv.families.blocks import attention, ends, pre_norms, query_scale, routed_experts
from maxconv.families.dims import Dims, size
from maxconv.families.rope import FULL
from maxconv.families.settings import (
    Computation,
    activation,
    chosen_experts,
    epsilon,
    no_window,
)
from maxconv.families.table import Family, each, uniform


@dataclass(frozen=True, kw_only=True)
class MixtralDims(Dims):
    moe_mlp: int = size("intermediate_size", maxtext="base_moe_mlp_dim")


def rows(d: Dims):
    attn = attention(d, query=(query_scale(d.head_dim),))
    experts = routed_experts(d, "MoeBlock_0", "block_sparse_moe", ("w1", "w3", "w2"))
    return (*ends(d), *each(uniform(d.layers), pre_norms(d), attn, experts))


MIXTRAL = Family(
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    decoder_block="mixtral",
    rows=rows,
    sizes=MixtralDims,
    computes=Computation(
        (epsilon(1e-5), activation(), chosen_experts(2)), (no_window(),), {FULL: 1_000_000.0}
    ),
    names=(("model.layers.*.mlp.", "model.layers.*.block_sparse_moe."),),  # of transformers 5
    in_memory=(("model.layers.*.block_sparse_moe.", "model.layers.*.mlp."),),
    split_experts=(
        (".experts.gate_up_proj", (".experts.{e}.w1.weight", ".experts.{e}.w3.weight")),
        (".experts.down_proj", (".experts.{e}.w2.weight",)),
    ),
)
