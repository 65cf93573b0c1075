"""MaxText trains from a Hugging Face checkpoint, without a checkpoint of its own on disk.

    from maxconv import maxtext
    maxtext.install()

before MaxText's trainer is started, with `source_checkpoint_layout=safetensors_dynamic` and
`load_parameters_path` a directory, gs://bucket/path, or org/name on the Hub. MaxText is imported
only by `install`.
"""

from typing import Any

import jax

from maxconv.config import model_facts
from maxconv.config.tables import known_models
from maxconv.errors import UserError
from maxconv.jobs.load import load


def load_safetensors_dynamic_state(
    path: str, abstract_params: Any, maxtext_config: Any
) -> tuple[None, dict[str, Any]]:
    """Takes the place of MaxText 0.2.5's function (checkpoint_conversion/utils/load_dynamic.py).

    Args:
        path: of the Hugging Face checkpoint; empty: where the model of the config is published.
        abstract_params: the weights of the state to fill, with their shardings: Flax' collection
            `{"params": ...}`, or the state of an NNX model.
        maxtext_config: MaxText's configuration.

    Returns:
        None, and the weights as the collection `{"params": ...}`.

    Raises:
        UserError: with everything that does not match; nothing was loaded.
        RetryableError: a server fails.
    """
    name = maxtext_config.model_name
    facts = model_facts(name) if name in known_models() else None
    if not (path or facts):
        raise UserError(
            f"model_name={name} is not a published model; name the checkpoint with "
            "load_parameters_path."
        )
    is_nnx = hasattr(abstract_params, "to_pure_dict")
    tree = abstract_params.to_pure_dict() if is_nnx else abstract_params
    loaded = load(
        path or (facts or {})["hf_id"],
        jax.tree.map(_shape, tree),
        param_scan_axis=maxtext_config.param_scan_axis,
        rope_type=_rope_type(maxtext_config),
        token=maxtext_config.hf_access_token or None,
    )
    return None, loaded if "params" in loaded else {"params": loaded}


def _rope_type(config: Any) -> str:
    """A rope_type that turns the same parts of a head as that of MaxText's configuration."""
    if config.model_name.startswith("llama3.1"):  # whatever it says
        return "llama3.1"
    in_halves = config.rope_type == "yarn" and not config.rope_interleave
    return "default" if in_halves else config.rope_type


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def install() -> None:
    """Has MaxText load with maxconv where source_checkpoint_layout is safetensors_dynamic."""
    from maxtext.common import checkpointing  # pyright: ignore[reportMissingImports]

    checkpointing.load_safetensors_dynamic_state = load_safetensors_dynamic_state
