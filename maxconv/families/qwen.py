"""Qwen2.5, and Qwen3 dense and MoE.

transformers modeling_qwen2.py, modeling_qwen3.py, modeling_qwen3_moe.py; MaxText models/qwen2.py,
models/qwen3.py.
"""

from dataclasses import dataclass

from maxconv.families.blocks import (
    FUSED,
    attention,
    ends,
    gated_mlp,
    pre_norms,
    qk_norms,
    routed_experts,
)
from maxconv.families.dims import Dims, size
from maxconv.families.settings import (
    Computation,
    activation,
    chosen_experts,
    epsilon,
    normalized_experts,
    switched_window,
)
from maxconv.families.table import Family, each, uniform


@dataclass(frozen=True, kw_only=True)
class ExpertsOnly(Dims):
    """intermediate_size in config.json is for dense layers, and these models have none."""

    mlp: int = size("moe_intermediate_size", maxtext="base_mlp_dim")


def qwen2_rows(d: Dims):
    layer = (pre_norms(d), attention(d, bias=True), gated_mlp(d))
    return (*ends(d), *each(uniform(d.layers), *layer))


def qwen3_rows(d: Dims):
    layer = (pre_norms(d), attention(d), qk_norms(d), gated_mlp(d))
    return (*ends(d), *each(uniform(d.layers), *layer))


def qwen3_moe_rows(d: Dims):
    experts = routed_experts(d, "moe_block", "mlp")
    layer = (pre_norms(d), attention(d), qk_norms(d), experts)
    return (*ends(d), *each(uniform(d.layers), *layer))


QWEN2 = Family(
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    decoder_block="qwen2",
    rows=qwen2_rows,
    computes=Computation(fixed=(switched_window(),)),
    pads_vocab=True,
)
QWEN3 = Family(
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    decoder_block="qwen3",
    rows=qwen3_rows,
    computes=Computation(fixed=(switched_window(),)),
    pads_vocab=True,
)
QWEN3_MOE = Family(
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    decoder_block="qwen3_moe",
    rows=qwen3_moe_rows,
    computes=Computation(
        settings=(epsilon(), activation(), chosen_experts(8)),
        fixed=(switched_window(), normalized_experts(False)),
    ),
    pads_vocab=True,
    sizes=ExpertsOnly,
    split_experts=FUSED,
)
