"""Sources of checkpoints: local directories, buckets and the Hugging Face Hub."""

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
        revision: of a model on the Hub; ignored, with a notice, for directories and buckets.
        token: for the Hub; default: HF_TOKEN, HF_AUTH_TOKEN, or that of `hf auth login`.
        config: the file that describes the model; adapter_config.json for a LoRA adapter.
        max_retries: how many times a failed request is retried.
        cache: first download a model of the Hub into the Hugging Face cache, and read that.
        commit: the commit that another process resolved the revision to.

    Raises:
        UserError: with everything that is wrong with the checkpoint.
        RetryableError: a server fails.
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
