"""Checks the values of a config; each problem is one sentence."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from maxconv.config.tables import MODEL_KEYS, defaults, model_facts
from maxconv.errors import UserError

# Keys of which only the default value is supported so far.
_FIXED_KEYS = (
    "fused_qkv",
    "fused_mlp",
    "share_kv_projections",
    "prefuse_moe_weights",
    "global_parameter_scale",
    "ici_pipeline_parallelism",
    "dcn_pipeline_parallelism",
)

_CHOICES = {
    "save_dtype": ("bfloat16", "float32", "float8_e4m3fn"),
    "verify": ("none", "sample", "full"),
    "eager_load_method": ("safetensors", "transformers"),
    "hardware": ("tpu", "cpu"),
    "names": ("published", "transformers"),
    "layout": ("size", "source"),
}
_NOT_YET = {  # values that MaxText has and a conversion does not support
    "hardware": ("gpu", "gpu_multiprocess"),
}
_MINIMUM = {
    "param_scan_axis": 0,
    "simulated_cpu_devices_count": 1,
    "max_retries": 0,
    "num_processes": 1,
    "process_id": 0,
    "jax_distributed_initialization_timeout": 1,
    "max_shard_size": 1,
    "lora_rank": 1,
}
MOST_DEVICES = 1024  # simulated on one machine: JAX starts threads for each of them
_LARGEST_NUMBER = 2**31 - 1
_MAXIMUM = {
    "simulated_cpu_devices_count": MOST_DEVICES,
    "num_slices": 1024,
    "num_processes": 65_536,
    "max_retries": 1000,
    "jax_distributed_initialization_timeout": 7 * 24 * 3600,
    "base_num_decoder_layers": 4096,
    "num_hidden_layers_for_vit": 4096,
    "encoder_layers_for_audio": 4096,
    "mtp_num_layers": 4096,
    "num_experts": 65_536,
    "max_host_memory_gb": 1 << 20,
    "max_shard_size": 1 << 60,
}
# Model keys that may be set without override_model_config.
_CHOSEN = ("use_multimodal", "use_audio", "mtp_num_layers")
# -1: what is left, or none.
_POSITIVE_OR_MINUS_ONE = ("num_slices", "base_moe_mlp_dim")
_SIZES = ("head_dim", "vocab_size", "num_experts", "inhomogeneous_layer_cycle_interval")
_SIZES += ("interleave_moe_layer_step",)
_MINIMUM |= {
    key: 1
    for key in MODEL_KEYS
    if key in _SIZES
    or (key.endswith(("_for_vit", "_for_audio")) and key != "deepstack_visual_indexes_for_vit")
    or (key.startswith(("base_", "gdn_")) and key not in _POSITIVE_OR_MINUS_ONE)
}


def value_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the final values of all keys and flags."""
    for key, choices in _CHOICES.items():
        if values[key] in _NOT_YET.get(key, ()):
            yield f"{key}={values[key]} is not supported; use {' or '.join(choices)}"
        elif values[key] not in choices:
            yield f"{key}={values[key]} is not one of {', '.join(choices)}"
    for key in _FIXED_KEYS:
        if values[key] != defaults()[key]:
            yield f"{key}={values[key]} is not supported; remove it"
    for key, minimum in _MINIMUM.items():
        if values[key] is not None and values[key] < minimum:
            yield f"{key}={values[key]} is less than {minimum}"
    for key, value in values.items():
        most = _MAXIMUM.get(key, _LARGEST_NUMBER)
        if isinstance(value, int | float) and value > most:
            yield f"{key}={value} is more than {most}"
    for key, value in values.items():
        may_be_minus_one = key.endswith("_parallelism") or key in _POSITIVE_OR_MINUS_ONE
        if may_be_minus_one and value < 1 and value != -1:
            yield f"{key}={value} is neither positive nor -1"
    to_the_hub = str(values["base_output_directory"]).startswith("hf://")
    if values["public"] and not to_the_hub:
        yield "public=True is only for the Hub: it needs base_output_directory=hf://org/name"
    if to_the_hub and not values["checkpoint_storage_use_ocdbt"]:
        yield "checkpoint_storage_use_ocdbt=False is not supported on the Hub; remove it"
    if values["layout"] == "source" and values["max_shard_size"] is not None:
        yield "max_shard_size has no effect with --layout=source; remove one of the two"
    if (memory := values["max_host_memory_gb"]) is not None and not memory > 0:
        yield f"max_host_memory_gb={memory} is not positive"
    yield from _mesh_problems(values["mesh_axes"], values["logical_axis_rules"])
    yield from _process_problems(values)


def model_problems(
    name: str | None, overrides: Mapping[str, Any], may_override: bool
) -> Iterator[str]:
    """An unknown model, or a size that is not the model's own without `override_model_config`."""
    try:
        facts = model_facts(name) or {}
    except UserError as error:
        yield from error.problems
        return
    for key, value in overrides.items():
        fewer_layers = key == "base_num_decoder_layers" and value < facts.get(key, 0)
        may_differ = may_override or fewer_layers or key in _CHOSEN
        if key in facts and value != facts[key] and not may_differ:
            yield (
                f"{key}={value} differs from {facts[key]}, that of {name}; remove it, or add "
                "override_model_config=True"
            )


def is_rule(rule: Any) -> bool:
    """Whether `rule` is `[name, axes]`, axes being one, several or none."""
    if not (isinstance(rule, list) and len(rule) == 2 and isinstance(rule[0], str)):
        return False
    axes = rule[1]
    return axes is None or isinstance(axes, str) or _are_names(axes)


def _are_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _mesh_problems(axes: Any, rules: Sequence[Any]) -> Iterator[str]:
    if not _are_names(axes) or not axes or len(set(axes)) < len(axes):
        yield f"mesh_axes={axes} is not a list of different names"
    for rule in rules:
        if not is_rule(rule):
            yield f"logical_axis_rules: {rule} is not of the form [name, [mesh axes]]"


def _process_problems(values: Mapping[str, Any]) -> Iterator[str]:
    names = ("coordinator_address", "num_processes", "process_id")
    missing = [f"--{name}" for name in names if values[name] is None]
    if missing and len(missing) < len(names):
        yield f"{' and '.join(missing)} missing: give all of --{', --'.join(names)}, or none"
    elif not missing and values["process_id"] >= values["num_processes"]:
        yield (
            f"--process_id={values['process_id']} is not below "
            f"--num_processes={values['num_processes']}"
        )
