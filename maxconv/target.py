"""The place where a checkpoint goes: checked before, never half-written."""

import os
import shutil
from pathlib import Path

from maxconv.report import size

STEP = "0"  # MaxText's converter writes step 0


def items(directory: str) -> str:
    """Where MaxText finds the weights: its load_parameters_path."""
    return f"{directory.rstrip('/')}/{STEP}/items"


def problems(directory: str, nbytes: int, overwrite: bool) -> list[str]:
    """What stands in the way of writing `nbytes` there, in sentences."""
    if "://" in directory:
        return [] if directory.startswith("gs://") else [f"{directory} is not a place to write to."]
    step = Path(directory, STEP)
    if step.exists() and not overwrite:
        return [f"{step} exists; add --overwrite to replace it, or name another directory."]
    there = _nearest(Path(directory))
    if not there.is_dir():
        return [f"{there} is a file; base_output_directory must be a directory."]
    if not os.access(there, os.W_OK):
        return [f"{there} is not writable; name another base_output_directory."]
    free = shutil.disk_usage(there).free + (_nbytes(step) if step.exists() else 0)
    if free < nbytes:
        return [
            f"{there} has {size(free)} free, but the checkpoint takes {size(nbytes)}; make room, "
            "or name another base_output_directory."
        ]
    return []


def clear(directory: str) -> None:
    """Removes what an earlier run left unfinished, and the checkpoint that is to be replaced.

    Only what this command makes is touched: step 0, and Orbax's temporary forms of it.
    """
    if "://" in directory:
        return
    for path in Path(directory).glob(f"{STEP}*"):
        if path.name == STEP or path.name.startswith(f"{STEP}.orbax-checkpoint-tmp"):
            shutil.rmtree(path)


def _nearest(path: Path) -> Path:
    """The path itself, or the first directory above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _nbytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
