"""Where checkpoints are read from."""

import os
import re

from maxconv.errors import UserError
from maxconv.sources.adapted import AdaptedSource
from maxconv.sources.base import Part, Source, Stats, TensorInfo, Traffic, aligned_empty
from maxconv.sources.files import FileSource
from maxconv.sources.local import LocalSource

__all__ = [
    "AdaptedSource",
    "FileSource",
    "LocalSource",
    "Part",
    "Source",
    "Stats",
    "TensorInfo",
    "Traffic",
    "aligned_empty",
    "open_source",
]


def open_source(
    path: str,
    revision: str | None = None,
    token: str | None = None,
    config: str = "config.json",
    max_retries: int = 5,
    cache: bool = False,
    commit: str | None = None,
) -> FileSource:
    """Opens a Hugging Face checkpoint.

    Args:
        path: a local directory, one in a bucket (`gs://bucket/path`), or a model on the Hugging
            Face Hub: `hf://org/name[@revision]`, or just `org/name`.
        revision: of a model on the Hub; a directory has none to choose from.
        token: for the Hub; default: HF_TOKEN, HF_AUTH_TOKEN, or that of `hf auth login`.
        config: the file that says what it is; adapter_config.json in a LoRA adapter.
        max_retries: how often a request is tried again.
        cache: download a model of the Hub into the Hugging Face cache, and read it there.
        commit: that a revision on the Hub was found to be, by another process.

    Raises:
        UserError: with everything that is wrong with it.
        RetryableError: when a server fails.
    """
    if path.startswith("gs://"):
        from maxconv.sources.gcs import GcsSource

        return _without_revision(GcsSource(path, max_retries, config), revision)
    name, _, own = path.removeprefix("hf://").partition("@")
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None
    if path.startswith("hf://") and not is_name:
        raise UserError(f"{path} is not of the form hf://org/name or hf://org/name@revision.")
    if path.startswith("hf://") or (is_name and not os.path.exists(path)):
        from maxconv.sources.hub import open_hub

        return open_hub(name, commit or own or revision, token, max_retries, cache, config)
    return _without_revision(LocalSource(path, config), revision)


def _without_revision(source: FileSource, revision: str | None) -> FileSource:
    if revision is not None:
        notice = f"{source.root} is a directory: revision {revision} is ignored"
        source.notices = (*source.notices, notice)
    return source
