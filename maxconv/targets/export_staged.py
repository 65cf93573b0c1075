"""An export to a place that takes whole files: each is made on disk, sent there, and deleted."""

import hashlib
import shutil
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

import jax
from huggingface_hub import constants

from maxconv.execution.timeline import span
from maxconv.processes import liveness
from maxconv.targets.export_target import Differs, ExportTarget, check_disks
from maxconv.targets.shards import Contents, File, Writer

_AT_ONCE = 4  # files of a process that are being sent


class StagedExport(ExportTarget):
    """Each process makes its files in a directory of its own, which no other host has to see.

    A file is sent as soon as all its bytes are written, while others are being made.
    """

    def __init__(self, where: str, contents: Contents, overwrite: bool):
        super().__init__(where, contents, overwrite)
        name = f"export-{hashlib.sha256(self.place.encode()).hexdigest()[:12]}"
        # The same in each attempt, so that what a killed one left is found.
        self.directory = Path(constants.HF_HOME, "maxconv", name, str(jax.process_index()))
        self._pool = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="upload")
        self._going: list[Future[None]] = []
        self._uploaded, self._lock = 0, Lock()

    @property
    def uploaded(self) -> int:
        return self._uploaded

    @abstractmethod
    def _prepare(self) -> tuple[str, ...]:
        """Prepares the place, called by all processes; returns notices for the user."""

    @abstractmethod
    def _send(self, file: File, path: Path) -> None:
        """Sends a file, to where it is not yet visible as part of a checkpoint."""

    def check_room(self) -> None:
        mend = " to stage the files; free some space, or set HF_HOME to a directory on another disk"
        check_disks(self.directory, sum(file.nbytes for file in self.mine), False, mend)

    def _begin(
        self, record: Mapping[str, Any], differs: Differs | None
    ) -> tuple[Mapping[str, int], tuple[str, ...]]:
        del record, differs  # what an earlier attempt sent is not recorded, so it starts over
        notices = self._prepare()
        shutil.rmtree(self.directory, ignore_errors=True)
        liveness.before_exit(self._discard)
        self._writer = Writer(self.directory, self.mine, complete=self._submit)
        return {}, notices

    def _submit(self, file: File) -> None:
        self._going.append(self._pool.submit(self._sent, file))

    def _sent(self, file: File) -> None:
        path = self.directory / file.name
        with span("upload", file.name, file.nbytes):
            self._send(file, path)
        path.unlink()
        with self._lock:
            self._uploaded += file.nbytes - len(file.header)

    def wrote(self, part: str, nbytes: int) -> None:
        for upload in [upload for upload in self._going if upload.done()]:
            upload.result()

    def finish(self) -> None:
        for upload in self._going:
            upload.result()
        assert len(self._going) == len(self.mine), "a file has bytes that were not written"

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._discard()
        super().close()

    def _discard(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)
        with suppress(OSError):  # other processes of this host are not done with it
            self.directory.parent.rmdir()
