"""Where checkpoints are read from."""

import os
import re

from maxconv.errors import UserError
from maxconv.sources.adapted import AdaptedSource
from maxconv.sources.base import Part, Source, Stats, aligned_empty, coalesce, runs
from maxconv.sources.local import LocalSource
from maxconv.sources.safetensors import TensorInfo

__all__ = [
    "AdaptedSource",
    "LocalSource",
    "Part",
    "Source",
    "Stats",
    "TensorInfo",
    "aligned_empty",
    "coalesce",
    "open_source",
    "runs",
]


def open_source(
    path: str,
    revision: str | None = None,
    token: str | None = None,
    config: str = "config.json",
) -> Source:
    """Opens a Hugging Face checkpoint.

    Args:
        path: a local directory.
        revision: of a model on the Hugging Face Hub; a directory has none to choose from.
        token: for the Hugging Face Hub; unused for a directory.
        config: the file that says what it is; adapter_config.json in a LoRA adapter.

    Raises:
        UserError: with everything that is wrong with it.
    """
    if path.startswith("gs://"):
        raise UserError(
            f"{path} is not supported yet; copy it to a local directory first: "
            f"`gcloud storage cp --recursive {path} DIR`."
        )
    name = path.removeprefix("hf://")
    if name != path or (re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path) and not os.path.exists(path)):
        raise UserError(
            f"{path} is not a local directory, and reading from the Hugging Face Hub is not "
            f"supported yet; run `hf download {name} --local-dir DIR` first, then give DIR."
        )
    source = LocalSource(path, config)
    if revision is not None:
        source.notices = (*source.notices, f"{path} is a directory: revision {revision} is ignored")
    return source
