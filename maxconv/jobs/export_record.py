"""What is recorded beside an exported checkpoint, in maxconv.json: how to make it again."""

import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from maxconv import __version__
from maxconv.config import recorded
from maxconv.errors import UserError
from maxconv.targets import place
from maxconv.targets.repository import is_repository

_JOB = "export"


def record(words: Sequence[str], checkpoint: str) -> dict[str, Any]:
    """What to record.

    Args:
        words: of the config.
        checkpoint: the tree of parameters that was exported.
    """
    root = checkpoint if "://" in checkpoint else os.path.abspath(checkpoint)
    return {
        "maxconv": __version__,
        "job": _JOB,
        "words": [*words, f"load_parameters_path={root}"],
    }


def recorded_export(directory: str) -> list[str] | None:
    """The arguments of an export, from the maxconv.json in it; None if that is not an export's.

    Whoever made the checkpoint wrote it: only what shapes an export is taken.

    Raises:
        UserError: a value has a wrong type; or there is a Hugging Face checkpoint, but nothing
            that says what it was made of.
    """
    if is_repository(directory):
        return None
    found = None
    try:
        found = place.record(directory, place.WORDS)
    except (ValueError, OSError):
        pass
    if found is None and _is_hugging_face(epath.Path(directory)):
        raise UserError(
            f"{directory} has no intact {place.WORDS}, which says what it was exported from; "
            "export it again."
        )
    if found is None or found.get("job") != _JOB:
        return None
    return recorded(found.get("words", []))


def _is_hugging_face(directory: epath.Path) -> bool:
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set[str]()
    return "config.json" in names and place.STEP not in names
