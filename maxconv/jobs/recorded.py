"""What is recorded beside a MaxText checkpoint: the job that made it, and the model it is of."""

import json
import os
from dataclasses import replace
from typing import Any

from etils import epath

from maxconv.config import Config, model_facts, recorded
from maxconv.config.tables import known_models
from maxconv.errors import UserError
from maxconv.sources.trees import Tree
from maxconv.targets import place


def with_model(
    config: Config, tree: Tree, taken: str = "names and small files are those"
) -> tuple[Config, tuple[str, ...]]:
    """The config with a published model, and sentences about where it is from.

    It is the one that the tree was converted from; if that is not known, or not here any more, the
    one of model_name. `taken`: what is taken from it, in words.

    Raises:
        UserError: there is none.
    """
    if config.hf_model_path is not None:
        return config, ()
    path, revision = recorded_model(tree)
    if path is not None and _may_be_there(path):
        found = replace(config, hf_model_path=path, revision=config.revision or revision)
        return found, (f"{taken} of {path}, which it was converted from",)
    gone = f"it was converted from {path}, which is not here"
    if facts := model_facts(config.model_name):
        notice = f"{taken} of {facts['hf_id']}"
        return config, (f"{notice}; {gone}" if path else notice,)
    raise UserError(
        "Name the model at Hugging Face that it is, or was trained from, with --hf_model_path= or "
        f"model_name={f': {gone}' if path else ''}."
    )


def recorded_model(tree: Tree) -> tuple[str | None, str | None]:
    """The model that a tree was converted from, and its revision; None where it is not known."""
    said = _said(tree)
    named = known_models().get(said.get("model_name", ""), {})
    return said.get("hf_model_path", named.get("hf_id")), said.get("revision")


def _may_be_there(path: str) -> bool:
    return not os.path.isabs(path) or os.path.exists(path)


def recorded_axes(tree: Tree) -> list[int]:
    """The axis along which the layers of a tree are stacked, if it is known."""
    said = _said(tree)
    return [int(said["param_scan_axis"])] if "param_scan_axis" in said else []


def recorded_order(tree: Tree) -> dict[str, str | None]:
    """The rope_type that a tree was converted with, as an argument; empty if that is not known."""
    said = _said(tree)
    named = model_facts(said.get("model_name")) or {}
    return {"rope_type": said.get("rope_type", named.get("rope_type"))} if said else {}


def _said(tree: Tree) -> dict[str, str]:
    return dict(word.split("=", 1) for word in recorded_arguments(tree.item.directory))


def recorded_arguments(items: epath.Path) -> list[str]:
    """The arguments of the job, from the maxconv.json next to a checkpoint, if any."""
    return recorded(_record(items).get("words", []))


def recorded_job(items: epath.Path) -> str:
    """The job that wrote a checkpoint, "convert" or "relayout"."""
    return str(_record(items).get("job", "convert"))


def _record(items: epath.Path) -> dict[str, Any]:
    try:
        found = json.loads((items.parent.parent / place.WORDS).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
