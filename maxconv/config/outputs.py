"""Files that a command writes besides a checkpoint, such as a report.

maxconv marks what it writes there, and overwrites only files with that mark.
"""

import os
import tempfile
from pathlib import Path

from maxconv.text import MARK

_WITHIN = 4096  # bytes from the beginning of a file


def output_problem(option: str, path: str) -> str | None:
    """Why an option cannot write to this file, in a sentence; None if it can.

    Args:
        option: with its dashes: --report.
        path: of the file, which need not exist.
    """
    file = Path(path)
    directory = file.absolute().parent
    if "\0" in path or not directory.is_dir():
        return f"{option}={path}: there is no directory {directory}; create it first."
    if not os.path.lexists(file):
        try:
            with tempfile.TemporaryFile(dir=directory):
                return None
        except OSError as error:
            why = error.strerror
            return f"{option}={path}: {directory} cannot be written to ({why}); name another file."
    if not file.is_file() or not _has_mark(file):
        return (
            f"{option}={path} already exists and was not written by maxconv; name another file, or "
            "remove it first."
        )
    if not os.access(file, os.W_OK):
        return f"{option}={path} cannot be written to; name another file."
    return None


def of_process(path: str, process: int, processes: int) -> str:
    """The file name for one process; with several processes it contains the process index."""
    file = Path(path)
    return path if processes == 1 else str(file.with_stem(f"{file.stem}.{process}"))


def _has_mark(file: Path) -> bool:
    try:
        with file.open("rb") as content:
            return MARK.encode() in content.read(_WITHIN)
    except OSError:
        return False
