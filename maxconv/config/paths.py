"""Paths on a command line: of any argument and command, they are read in one way."""

import os
import re
from urllib.parse import unquote, urlsplit

from maxconv.errors import UserError

_HUBS = ("huggingface.co", "www.huggingface.co", "hf.co")
_PAGE = re.compile(r"/([^/]+/[^/]+)(?:/(?:tree|blob|resolve)/([^/]+)(/.*)?)?/?")
_NO_MODELS = ("datasets/", "spaces/", "docs/", "blog/", "api/")
_ONE_SLASH = re.compile(r"(gs|hf|https?):/(?!/)")

KEYS = (
    "base_output_directory",
    "hf_model_path",
    "hf_lora_adapter_path",
    "load_parameters_path",
    "lora_restore_path",
    "trace",
    "report",
    "export",
)
"""The arguments of `key=value` that are paths."""


def checked_path(key: str, text: str) -> str:
    """A path as `read_path` returns it; UserError if it is none."""
    if problem := path_problem(key, text):
        raise UserError(f"{problem}.")
    return read_path(text)


def read_path(text: str) -> str:
    """A path as it is meant: `~` is home, a page of the Hub is the model on it, and a slash at the
    end says nothing."""
    if page := _page(text):
        name, revision = page[1], unquote(page[2] or "")
        return f"hf://{name}@{revision}" if revision else f"hf://{name}"
    shorter = text.removeprefix("file://").rstrip("/") or text
    return shorter if "://" in shorter else os.path.expanduser(shorter)


def path_problem(key: str, text: str) -> str | None:
    """Why a text is no path, in a sentence."""
    if match := _ONE_SLASH.match(text):
        rest = text[match.end() :]
        return f"{key}={text} is no path: write {match[1]}://{rest}"
    if not text.startswith(("http://", "https://")):
        return None
    page = _page(text)
    if page is None or page[1].startswith(_NO_MODELS):
        return (
            f"{key}={text} is no page of a model on the Hub: give a directory, gs://bucket/path or "
            "hf://org/name"
        )
    if (page[3] or "/") != "/" and "/tree/" in text:
        return f"{key}={text} is a directory within a model, which cannot be read: download it"
    return None


def _page(text: str) -> re.Match[str] | None:
    """The name, the revision and the file of a page of the Hub; None if it is of none."""
    parts = urlsplit(text)
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if parts.scheme not in ("http", "https") or parts.netloc not in (*_HUBS, endpoint):
        return None
    return _PAGE.fullmatch(parts.path)
