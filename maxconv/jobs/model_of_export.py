"""The published model of an export, where no --hf_model_path names it."""

import os
from dataclasses import replace

from maxconv.config import Config, model_facts
from maxconv.config.tables import known_models
from maxconv.errors import UserError
from maxconv.jobs.verify import recorded_arguments
from maxconv.sources.trees import Tree


def with_model(
    config: Config, tree: Tree, taken: str = "names and small files are those"
) -> tuple[Config, tuple[str, ...]]:
    """The config with a published model, and sentences about where it is from.

    It is the one that the tree was converted from, as maxconv.json beside it says; if that is not
    known, or not here any more, the one of model_name. `taken`: what is taken from it, in words.

    Raises:
        UserError: there is none.
    """
    if config.hf_model_path is not None:
        return config, ()
    said = dict(word.split("=", 1) for word in recorded_arguments(tree.item.directory))
    named = known_models().get(said.get("model_name", ""), {})
    path = said.get("hf_model_path", named.get("hf_id"))
    if path is not None and (not os.path.isabs(path) or os.path.exists(path)):
        found = replace(
            config, hf_model_path=path, revision=config.revision or said.get("revision")
        )
        return found, (f"{taken} of {path}, which it was converted from",)
    gone = f"it was converted from {path}, which is not here"
    if facts := model_facts(config.model_name):
        notice = f"{taken} of {facts['hf_id']}"
        return config, (f"{notice}; {gone}" if path else notice,)
    raise UserError(
        "Name the model at Hugging Face that it is, or was trained from, with "
        f"--hf_model_path= or model_name={f': {gone}' if path else ''}."
    )
