"""The data in `configs/`: MaxText's keys and their defaults, and the models."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from maxconv.config.argv import did_you_mean, own_yaml
from maxconv.errors import UserError

MODEL_KEYS = (
    "decoder_block",
    "base_emb_dim",
    "base_num_query_heads",
    "base_num_kv_heads",
    "base_mlp_dim",
    "base_num_decoder_layers",
    "head_dim",
    "vocab_size",
    "logits_via_embedding",
    "attention_bias",
    "rope_type",
    "use_qk_norm",
    "num_experts",
    "base_moe_mlp_dim",
    "inhomogeneous_layer_cycle_interval",
    "interleave_moe_layer_step",
    "nope_layer_interval",
    "first_num_dense_layers",
    "shared_experts",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "indexer_n_heads",
    "indexer_head_dim",
    "mtp_num_layers",
    "mhc_expansion_rate",
    "first_num_hash_layers",
    "o_groups",
    "o_lora_rank",
    "gdn_conv_kernel_dim",
    "gdn_num_key_heads",
    "gdn_num_value_heads",
    "gdn_key_head_dim",
    "gdn_value_head_dim",
    "global_head_dim",
    "global_num_kv_heads",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "use_multimodal",
    "hidden_size_for_vit",
    "intermediate_size_for_vit",
    "num_hidden_layers_for_vit",
    "num_attention_heads_for_vit",
    "num_channels_for_vit",
    "patch_size_for_vit",
    "image_size_for_vit",
    "tile_size_for_vit",
    "projector_input_dim_for_vit",
    "projector_output_dim_for_vit",
    "vision_output_dim_for_vit",
    "temporal_patch_size_for_vit",
    "spatial_merge_size_for_vit",
    "out_hidden_size_for_vit",
    "num_position_embeddings_for_vit",
    "deepstack_visual_indexes_for_vit",
    "use_audio",
    "d_model_for_audio",
    "encoder_ffn_dim_for_audio",
    "encoder_layers_for_audio",
    "encoder_attention_heads_for_audio",
    "num_mel_bins_for_audio",
    "downsample_hidden_size_for_audio",
    "output_dim_for_audio",
)
"""The keys that decide the shapes of a model's weights, and their order."""


def config_path(name: str) -> Path:
    """Where `configs/<name>` is: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "configs" / name
    return installed if installed.exists() else package.parent / "configs" / name


def model_facts(model_name: str | None) -> Mapping[str, Any] | None:
    """Facts of a model: `hf_id`, `architecture`, and a value for each of `MODEL_KEYS`.

    `train_as`: MaxText's name, if this one is only its converter's. `logical_axis_rules`: those
    that are the model's own.
    """
    if model_name is None:
        return None
    models = known_models()
    if model_name not in models:
        near = did_you_mean(model_name, models) or "."
        raise UserError(
            f"model_name={model_name} is not supported{near} Run `maxconv families` to list the "
            "supported models, or leave model_name out if the architecture is supported."
        )
    return {key: defaults()[key] for key in MODEL_KEYS} | dict(models[model_name])


@cache
def defaults() -> Mapping[str, Any]:
    """The keys of MaxText that we read, with their default values."""
    return MappingProxyType(own_yaml(config_path("base.yml").read_text()))


@cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """The rows of `models.yml`."""
    table = own_yaml(config_path("models.yml").read_text())
    return {name: facts for name, facts in table.items() if not name.startswith(".")}


@cache
def trained_models() -> Mapping[str, Mapping[str, Any]]:
    """The values of MaxText's arguments that decide what it computes, for each model_name.

    `default` is the model_name of none. Keys are those of `model_facts`, of `training.yml`, and of
    the layout.
    """
    table = own_yaml(config_path("training.yml").read_text())
    base = {key: defaults()[key] for key in (*MODEL_KEYS, "scan_layers", "param_scan_axis")}
    base |= table[".base"]
    models = {"default": {}, **known_models()}
    return {
        name: {"model_name": name, **base, **facts, **table.get(name, {})}
        for name, facts in models.items()
    }


@cache
def maxtext_keys() -> frozenset[str]:
    """The names of all keys of MaxText."""
    return frozenset(config_path("maxtext_keys.txt").read_text().split())
