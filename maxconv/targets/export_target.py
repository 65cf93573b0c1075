"""Where an export goes: the interface of a directory, a bucket and a repository on the Hub.

Until `commit` nothing new there loads as a checkpoint of Hugging Face; then all of it appears, and
weights that were there before are gone.
"""

import os
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from maxconv.errors import ConversionError, UserError
from maxconv.processes.agreement import gathered, once, same_error_everywhere
from maxconv.sources import FileSource
from maxconv.targets import place
from maxconv.targets.ownership import Ownership, owned_by_all
from maxconv.targets.shards import Contents, Writer
from maxconv.text import size

PATIENCE = 24 * 3600  # seconds for process 0 to put the files of all in their places
Differs = Callable[[Mapping[str, Any]], str | None]


class ExportTarget(ABC):
    """A place for the files of a checkpoint.

    All processes call `check`, `begin`, `finish`, `commit` and `close`, in this order; in between
    each writes its files with `writer`.

    Attributes:
        place: the path or URL that the user gave.
        contents: what is written there.
        directory: where this process writes its files.
    """

    directory: Path

    def __init__(self, where: str, contents: Contents, overwrite: bool):
        self.place, self.contents, self.overwrite = where.rstrip("/"), contents, overwrite
        self.mine = contents.of(jax.process_index())
        self._ownership: Ownership | None = None  # held by process 0, on behalf of all
        self._writer: Writer | None = None

    @property
    def uploaded(self) -> int | None:
        """Bytes of tensors that this process has sent; None if it writes to the place itself."""
        return None

    @property
    @abstractmethod
    def lock(self) -> str:
        """Path of the lock that jobs with this target take."""

    @abstractmethod
    def problems(self) -> list[str]:
        """Everything that prevents an export to there, in sentences. Changes nothing."""

    @abstractmethod
    def check_room(self) -> None:
        """Raises UserError, on all processes, if there is not enough room on their disks."""

    def is_finished(self) -> bool:
        """Whether an earlier attempt of the same export has put everything there."""
        return False

    def check(self, resume: bool = False) -> bool:
        """Checks the place; returns whether there is nothing left to do, if that may be resumed.

        Raises:
            UserError: nothing can be exported to there; on all processes.
        """
        if gathered(resume and jax.process_index() == 0 and self.is_finished())[0]:
            return True
        with same_error_everywhere():
            if jax.process_index() == 0 and (found := self.problems()):
                raise UserError(found)
        self.check_room()
        return False

    def begin(
        self, record: Mapping[str, Any], differs: Differs | None
    ) -> tuple[Mapping[str, int], tuple[str, ...]]:
        """Takes the lock and prepares the place.

        Args:
            record: what is made here, for a later attempt; JSON-serializable.
            differs: why an attempt with another record cannot be resumed, in a sentence, or None
                if it can; None to start over.

        Returns:
            The parts that are kept, as `wrote` was told, with their bytes; notices for the user.

        Raises:
            UserError: another job writes there, or something has come there; on all processes.
        """
        self._ownership = owned_by_all(self.lock, self.place)
        with same_error_everywhere():
            if jax.process_index() == 0 and (found := self.problems()):
                raise UserError(found)
        return self._begin(record, differs)

    @abstractmethod
    def _begin(
        self, record: Mapping[str, Any], differs: Differs | None
    ) -> tuple[Mapping[str, int], tuple[str, ...]]: ...

    @property
    def writer(self) -> Writer:
        assert self._writer is not None, "begin was not called"
        return self._writer

    @abstractmethod
    def wrote(self, part: str, nbytes: int) -> None:
        """Notes that a part was written by this process, and raises what stopped uploads, if any.

        Args:
            part: a name for it, the same in each attempt.
            nbytes: of it in the files of this process.
        """

    @abstractmethod
    def finish(self) -> None:
        """Returns when all files of this process are durable."""

    def commit(self) -> None:
        """Makes the checkpoint appear; all processes have finished.

        Raises:
            ConversionError: files have come there meanwhile that may not be replaced.
        """
        once(self._commit, PATIENCE)

    @abstractmethod
    def _commit(self) -> None:
        """The work of process 0."""

    @abstractmethod
    def opened(self) -> FileSource:
        """The checkpoint, for reading it back; called by all processes."""

    def close(self) -> None:
        """Releases the lock and removes what is no longer needed."""
        if self._writer is not None:
            self._writer.close()
        if self._ownership is not None:
            self._ownership.release()

    # ---- for subclasses

    def there_problems(self, names: Iterable[str], what: str) -> list[str]:
        """A problem if a file would be replaced without being told to; `what` the place is."""
        there = sorted(filter(self.contents.replaces, names), key=_weights_first)
        if not there or self.overwrite:
            return []
        return [
            f"{self.place} holds {there[0]}; add --overwrite to replace it, or name another {what}."
        ]

    def check_nobody_came(self, before: Iterable[str], now: Iterable[str]) -> None:
        """Raises ConversionError if files have come since the beginning that would be replaced."""
        if came := sorted(filter(self.contents.replaces, set(now) - set(before))):
            raise ConversionError(
                f"{came[0]} was put into {self.place} by someone else meanwhile, so the export was "
                "not put there; remove it, or name another place, and export again."
            )


def _weights_first(name: str) -> tuple[bool, str]:
    return not name.endswith(".safetensors"), name


def check_disks(directory: Path, nbytes: int, is_shared: bool, mend: str = "") -> None:
    """Checks the room for files of all processes, several of which may write to one disk.

    Args:
        directory: of the files of this process; what it holds will be replaced.
        nbytes: of the files of this process.
        is_shared: whether it is the same directory on all hosts.
        mend: the end of the sentence, if there is not enough.

    Raises:
        UserError: there is not enough, or a directory cannot be written to; on all processes.
    """
    mine: tuple[str, str, int, int] = "", "", 0, 0
    with same_error_everywhere():
        there = place.nearest(directory)
        try:
            tempfile.TemporaryFile(dir=there).close()  # has no name: nobody ever sees it
            disk = "shared" if is_shared else f"{socket.gethostname()} {os.stat(there).st_dev}"
            held = place.nbytes_in(directory) if not is_shared or jax.process_index() == 0 else 0
            mine = disk, str(there), shutil.disk_usage(there).free, nbytes - held
        except OSError as error:
            raise UserError(
                f"{there} is not a directory that can be written to ({error.strerror}); name "
                f"another one{mend}."
            ) from None
    disks: dict[str, list[tuple[str, int, int]]] = defaultdict(list)
    for disk, path, free, needed in gathered(mine):
        disks[disk].append((path, free, needed))
    for users in disks.values():
        (path, free, _), needed = users[0], sum(needed for _, _, needed in users)
        if free < needed:
            raise UserError(
                f"{path} has {size(free)} free, but the export needs {size(needed)}{mend}."
            )
