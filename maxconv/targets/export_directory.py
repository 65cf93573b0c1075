"""An export to a directory that all processes share."""

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from maxconv.errors import UserError
from maxconv.processes.agreement import gathered, once, same_error_everywhere
from maxconv.sources import FileSource, LocalSource
from maxconv.targets.export_journal import Journal, recorded, sync_directory, write_durably
from maxconv.targets.export_target import Differs, ExportTarget, check_disks
from maxconv.targets.place import WORDS
from maxconv.targets.shards import Contents, Writer, is_weights

UNFINISHED = "maxconv.unfinished"  # the directory in which files are made
# In it, with names that no file of a model has:
_RECORD = "plan"  # what an attempt makes
_FINISHED = "finished.{}"  # by process: the parts that are durable
_COMMIT = "commit"  # says that files were being put in their places


class DirectoryExport(ExportTarget):
    """Files are made in a directory beside their places, and renamed when all are durable."""

    def __init__(self, where: str, contents: Contents, overwrite: bool):
        super().__init__(where, contents, overwrite)
        self._final = Path(where)
        self.directory = self._final / UNFINISHED
        self._before: set[str] = set()
        self._journal: Journal | None = None

    @property
    def lock(self) -> str:
        return str(self._final / "maxconv.lock")

    def problems(self) -> list[str]:
        if os.path.lexists(self._final) and not self._final.is_dir():
            return [f"{self._final} is not a directory; name another one."]
        if found := [name for name in self._there() if (self._final / name).is_dir()]:
            return [f"{self._final / found[0]} is a directory; remove it, or name another place."]
        if (self.directory / _COMMIT).exists():  # what is there is ours, or was to be replaced
            return []
        return self.there_problems(self._there(), "directory")

    def is_finished(self) -> bool:
        small = self.contents.small
        sizes = {file.name: file.nbytes for file in self.contents.files}
        sizes |= {name: len(content) for name, content in small.items()}
        there = {name: self._final / name for name in sizes}
        if not all(p.is_file() and p.stat().st_size == sizes[name] for name, p in there.items()):
            return False
        return there[WORDS].read_bytes() == small[WORDS]

    def check_room(self) -> None:
        check_disks(self.directory, sum(file.nbytes for file in self.mine), is_shared=True)

    def _begin(
        self, record: Mapping[str, Any], differs: Differs | None
    ) -> tuple[Mapping[str, int], tuple[str, ...]]:
        attempt, notices = uuid.uuid4().hex, list[str]()

        def prepare() -> None:
            self._before = self._there()
            earlier = self._earlier() if differs else None
            why = differs(earlier) if differs and earlier else None
            if earlier is None or why is not None:
                notices.extend(filter(None, [why]))
                shutil.rmtree(self.directory, ignore_errors=True)
            content = json.dumps({"record": record, "attempt": attempt}).encode()
            write_durably(self.directory / _RECORD, content)

        once(prepare)
        self._check_shared(gathered(attempt)[0])
        mine = self.directory / _FINISHED.format(jax.process_index())
        kept = recorded(mine) if self._has_files() else {}
        self._writer = Writer(self.directory, self.mine, keep=bool(kept))
        sync_directory(self.directory)
        self._journal = Journal(mine, self._writer.sync, kept)
        return kept, tuple(notices)

    def _earlier(self) -> Mapping[str, Any] | None:
        """The record of an attempt that can be resumed, if there is one."""
        try:
            found = json.loads((self.directory / _RECORD).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        if (self.directory / _COMMIT).exists() or not isinstance(found, dict):
            return None
        record = found.get("record")
        return record if isinstance(record, dict) else None

    def _has_files(self) -> bool:
        """Whether all files of this process are there."""
        paths = {self.directory / file.name: file.nbytes for file in self.mine}
        return all(path.is_file() and path.stat().st_size == n for path, n in paths.items())

    def _check_shared(self, attempt: str) -> None:
        """Raises UserError, on all processes, if one does not see what process 0 wrote."""
        with same_error_everywhere():
            record = self.directory / _RECORD
            if not record.exists() or json.loads(record.read_bytes())["attempt"] != attempt:
                raise UserError(
                    f"The processes do not share {self._final}; name a directory that all of them "
                    "share, or export to gs:// or hf://."
                )

    def wrote(self, part: str, nbytes: int) -> None:
        assert self._journal is not None
        self._journal.add(part, nbytes)

    def finish(self) -> None:
        assert self._journal is not None
        self._journal.close()
        self._journal.check()
        self.writer.sync()
        self.writer.close()

    def _commit(self) -> None:
        self.check_nobody_came(self._before, self._there())
        write_durably(self.directory / _COMMIT, b"")
        for name in sorted(filter(is_weights, self._there())):
            (self._final / name).unlink()
        for name, content in self.contents.small.items():
            write_durably(self.directory / name, content)
        for name in sorted(self.contents.names - {self.contents.key}):
            self._place(name)
        sync_directory(self._final)
        self._place(self.contents.key)
        shutil.rmtree(self.directory)
        sync_directory(self._final)

    def _place(self, name: str) -> None:
        (self._final / name).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / name).rename(self._final / name)

    def _there(self) -> set[str]:
        """The files of the checkpoint that is there, and others with the names of ours."""
        names = {name for name in self.contents.names if os.path.lexists(self._final / name)}
        listed = os.listdir(self._final) if self._final.is_dir() else ()
        return names | set(filter(is_weights, listed))

    def opened(self) -> FileSource:
        return LocalSource(self._final, self.contents.config)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        super().close()
