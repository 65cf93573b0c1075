"""Publishes a checkpoint to a repository on the Hugging Face Hub, in one commit.

Orbax writes to a directory on disk. Process 0 uploads the data files of its OCDBT stores from there
while others are being written, and punches holes where their values were. The nodes between them
remain, because Orbax reads these when it merges the stores at the end. Nothing is visible in the
repository until everything is uploaded; then one commit adds it.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from etils import epath
from huggingface_hub import CommitOperationAdd, constants

from maxconv.errors import ConversionError
from maxconv.processes import liveness
from maxconv.sources.ocdbt import unexplained, value_spans
from maxconv.sources.orbax import Item
from maxconv.targets import place
from maxconv.targets.repository import Repository, repository_name
from maxconv.targets.sparse_files import MODE, NEW, HollowItem, make_hollow
from maxconv.text import duration

LARGE = 1 << 20  # bytes: larger files are uploaded before the end
AT_ONCE = 8  # files
INTERVAL = 0.2  # seconds between two checks for files that Orbax has finished
PATIENCE = 300  # seconds for the index of a store to refer to everything in its data files
_STORES = f"{place.STEP}*/items*/ocdbt.process_*"  # with their final or temporary names
_ITEMS = f"{place.STEP}/items"
_TEMPORARY = ".orbax-checkpoint-tmp"
_DATA_FILE = re.compile(r"[0-9a-f]{32}")


def scratch(place: str) -> str:
    """The directory on disk where a checkpoint for a repository is staged; the same in each run."""
    return os.path.join(constants.HF_HOME, "maxconv", repository_name(place).replace("/", "--"))


def repository(
    where: str, token: str | None, max_retries: int, public: bool, overwrite: bool
) -> Repository:
    """A repository of which step 0 is replaced."""
    prefix = f"{place.STEP}/"
    return Repository(where, token, max_retries, public, overwrite, lambda f: f.startswith(prefix))


def problems(where: str, overwrite: bool, public: bool, token: str | None) -> list[str]:
    """Everything that prevents a commit there, in sentences; changes nothing on the Hub."""
    return repository(where, token, 0, public, overwrite).problems()


class Publication:
    """Uploads a checkpoint to a repository. Process 0 does; others only use `wait_for_room`.

    `overwrite`: whether it may replace a checkpoint that is there when it begins.
    """

    def __init__(
        self, place: str, token: str | None, max_retries: int, public: bool, overwrite: bool
    ):
        self.place, self.scratch = place, Path(scratch(place))
        self._repository = repository(place, token, max_retries, public, overwrite)
        self._operations: dict[str, CommitOperationAdd] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._error: Exception | None = None
        self.made: str | None = None  # the id of the commit

    def begin(self) -> list[str]:
        """Creates the repository and starts uploading; returns notices for the user."""
        notices = self._repository.create()
        self._thread.start()
        return notices

    def wait_for_room(self, process: int, limit: int) -> None:
        """Waits until a process has no more than `limit` bytes of data files on disk.

        Raises:
            ConversionError: what is there cannot be uploaded, and nothing has changed for long.
        """
        seen, since = dict[str, int](), time.monotonic()
        while sum((waiting := _waiting(self.scratch, process)).values()) > limit:
            self.check()
            if waiting != seen:
                seen, since = waiting, time.monotonic()
            elif time.monotonic() - since > PATIENCE:
                if not any(map(_uploadable, _stores(self.scratch, process))):
                    raise ConversionError(
                        f"{next(iter(waiting))} cannot be uploaded: after {duration(PATIENCE)} the "
                        "index of its store does not refer to all of it; convert again."
                    )
                since = time.monotonic()  # the uploads are slow; they have bounds of their own
            time.sleep(INTERVAL)
        self.check()

    def check(self) -> None:
        """Raises the error that stopped the uploads, if any."""
        if self._error is not None:
            raise self._error

    def commit(self) -> None:
        """Uploads the rest, and makes the commit. Orbax must have finished.

        Raises:
            ConversionError: files were added to the repository that this conversion may not
                delete; or the repository does not contain what was sent.
        """
        self._done.set()
        self._thread.join()
        self.check()
        self._upload_finished()
        for file in self._files():
            if (path := _path(self.scratch, file)) not in self._operations:
                self._operations[path] = CommitOperationAdd(path, str(file))
        additions = list(self._operations.values())
        self.made = self._repository.commit(additions, "MaxText checkpoint")

    def whole(self, item: Item, commit: str) -> Item:
        """The checkpoint at a commit of the repository, from which values are fetched."""
        files = self._repository.at(commit)
        return HollowItem.of(item, lambda file, *what: files.fetch(f"{_ITEMS}/{file}", *what))

    def close(self) -> None:
        """Stops uploading, and removes the staged files."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _files(self) -> list[Path]:
        files = (path for path in sorted(self.scratch.rglob("*")) if path.is_file())
        return [path for path in files if not path.name.endswith(NEW)]

    def _run(self) -> None:
        try:
            while not self._done.wait(INTERVAL):
                self._upload_finished()
        except Exception as error:
            self._error = error
            if jax.process_count() > 1:  # the main thread may wait for others that wait for room
                liveness.fail(error)

    def _upload_finished(self) -> None:
        """Uploads the large files that are finished, and then punches holes into them."""
        for store in _stores(self.scratch):
            try:
                ready = _uploadable(store)
                files = [*ready]
                for i in range(0, len(files), AT_ONCE):
                    self._upload(files[i : i + AT_ONCE])
                for file, spans in ready.items():
                    make_hollow(file, spans)
            except (OSError, ValueError):  # expected if Orbax has renamed the directory
                if (store / "manifest.ocdbt").exists():
                    raise

    def _upload(self, files: Sequence[epath.Path]) -> None:
        paths = [_path(self.scratch, file) for file in files]
        additions = [
            CommitOperationAdd(path, os.fspath(file))
            for path, file in zip(paths, files, strict=True)
            if path not in self._operations  # else it is uploaded, only without holes so far
        ]
        if not additions:
            return
        try:
            self._repository.upload(additions)
        except Exception as error:
            if not files[0].exists():  # Orbax has renamed its directory
                raise FileNotFoundError(str(error)) from None
            raise
        for addition in additions:
            self._operations[addition.path_in_repo] = addition


def _path(root: Path, file: epath.PathLike) -> str:
    """The path of a file in the repository; its directories may still have temporary names."""
    *directories, name = Path(file).relative_to(root).parts
    return "/".join((*(d.partition(_TEMPORARY)[0] for d in directories), name))


def _data_files(store: epath.PathLike) -> Iterator[tuple[str, int]]:
    """The large files of a store that are not uploaded yet, with their sizes."""
    try:
        with os.scandir(os.path.join(store, "d")) as entries:
            for entry in entries:
                about = entry.stat()
                is_waiting = about.st_mode & 0o777 != MODE and about.st_size >= LARGE
                if is_waiting and _DATA_FILE.fullmatch(entry.name):
                    yield entry.path, about.st_size
    except FileNotFoundError:  # there are none yet, or the store was renamed
        pass


def _stores(root: Path, process: int | None = None) -> list[epath.Path]:
    """The OCDBT stores of one process, or of all."""
    stores = sorted(root.glob(_STORES))
    return [
        epath.Path(store)
        for store in stores
        if process is None or store.name == f"ocdbt.process_{process}"
    ]


def _waiting(root: Path, process: int) -> dict[str, int]:
    """The data files of a process that are to be uploaded and made hollow, with their sizes."""
    return {file: size for s in _stores(root, process) for file, size in _data_files(s)}


def _uploadable(store: epath.Path) -> dict[epath.Path, list[tuple[int, int]]]:
    """The data files of a store to be uploaded of which every byte is known, and where their values
    lie: others are still being written."""
    files = [epath.Path(file) for file, _ in _data_files(store)]
    try:
        values = value_spans(store) if files else {}
        spans = {file: sorted(values.get(f"d/{file.name}", ())) for file in files}
        return {file: spans[file] for file in files if not any(unexplained(file, spans[file]))}
    except (OSError, ValueError):
        # Its first version is not written, or Orbax gave the directory its last name.
        if (store / "manifest.ocdbt").exists():
            raise
        return {}
