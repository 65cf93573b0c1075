"""Paths on a command line: of any argument, they are read in one way."""

import os
import re

_HUB = re.compile(
    r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)(?:/tree/([^?#]+))?"
)
_ONE_SLASH = re.compile(r"(gs|hf|https?):/(?!/)")

KEYS = (
    "base_output_directory",
    "hf_model_path",
    "hf_lora_adapter_path",
    "load_parameters_path",
    "trace",
    "report",
)
"""The arguments that are paths."""


def read_path(text: str) -> str:
    """A path as it is meant: `~` is home, a page of the Hub is the model on it, and a slash at the
    end says nothing."""
    if page := _HUB.match(text):
        name, revision = page[1], (page[2] or "").rstrip("/")
        return f"hf://{name}@{revision}" if revision else f"hf://{name}"
    shorter = text.rstrip("/") or text
    return shorter if "://" in shorter else os.path.expanduser(shorter)


def path_problem(key: str, text: str) -> str | None:
    """Why a text is no path, in a sentence."""
    if match := _ONE_SLASH.match(text):
        rest = text[match.end() :]
        return f"{key}={text} is no path: write {match[1]}://{rest}"
    return None
