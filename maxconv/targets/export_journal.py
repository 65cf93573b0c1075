"""Records which parts of an export are durable, so that an interrupted one can be resumed."""

import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

INTERVAL = 2  # seconds between two records: the most work that is repeated


class Journal:
    """The record of one process, in a file beside its files.

    Args:
        path: of the record.
        sync: makes durable what was written until it is called.
        kept: parts that an earlier attempt recorded, with their bytes.
    """

    def __init__(self, path: Path, sync: Callable[[], None], kept: Mapping[str, int]):
        self._path, self._sync = path, sync
        self._parts, self._recorded, self._lock = dict(kept), len(kept), threading.Lock()
        self._error: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
        self._thread.start()

    def add(self, part: str, nbytes: int) -> None:
        """Adds a part that is written."""
        self.check()
        with self._lock:
            self._parts[part] = nbytes

    def close(self) -> None:
        """Stops recording; files may be closed after that."""
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while not self._done.wait(INTERVAL):
                self._record()
        except Exception as error:  # of the disk, which reports it only once
            self._error = error

    def _record(self) -> None:
        with self._lock:
            parts = dict(self._parts)
        if len(parts) == self._recorded:
            return
        self._sync()
        write_durably(self._path, json.dumps(parts).encode())
        self._recorded = len(parts)

    def check(self) -> None:
        """Raises the error that kept it from recording, if any."""
        if self._error is not None:
            raise self._error


def recorded(path: Path) -> dict[str, int]:
    """The parts in the record of an earlier attempt; empty if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    is_sound = isinstance(found, dict) and all(type(nbytes) is int for nbytes in found.values())
    return found if is_sound else {}


def write_durably(path: Path, content: bytes) -> None:
    """Writes a file that is there as a whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    with new.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes durable which files a directory has."""
    opened = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
