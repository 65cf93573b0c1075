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
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
from etils import epath
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging

from maxconv.errors import ConversionError, RetryableError, UserError
from maxconv.private.huggingface_hub import is_uploaded, nbytes
from maxconv.processes import liveness
from maxconv.sources.hub import HubSource, ask, find_token, told
from maxconv.sources.ocdbt import unexplained, value_spans
from maxconv.sources.orbax import Item
from maxconv.targets import place
from maxconv.targets.sparse_files import MODE, NEW, HollowItem, make_hollow
from maxconv.text import duration

T = TypeVar("T")

SCHEME = "hf://"
LARGE = 1 << 20  # bytes: larger files are uploaded before the end
AT_ONCE = 8  # files
INTERVAL = 0.2  # seconds between two checks for files that Orbax has finished
PATIENCE = 300  # seconds for the index of a store to refer to everything in its data files
_STORES = f"{place.STEP}*/items*/ocdbt.process_*"  # with their final or temporary names
_ITEMS = f"{place.STEP}/items"
_TEMPORARY = ".orbax-checkpoint-tmp"
_DATA_FILE = re.compile(r"[0-9a-f]{32}")
RETRIES = 5  # of requests before anything is written


def is_repository(where: str) -> bool:
    """Whether a base_output_directory is a repository on the Hub."""
    return where.startswith(SCHEME)


def scratch(place: str) -> str:
    """The directory on disk where a checkpoint for a repository is staged; the same in each run."""
    return os.path.join(constants.HF_HOME, "maxconv", repository_name(place).replace("/", "--"))


def problems(place: str, overwrite: bool, public: bool, token: str | None) -> list[str]:
    """Everything that prevents a commit there, in sentences; changes nothing on the Hub."""
    if not re.fullmatch(r"[\w-][\w.-]*/\w[\w.-]*", repository_name(place)):
        return [f"{place} is not of the form hf://org/name."]
    if constants.HF_HUB_OFFLINE:
        return [f"HF_HUB_OFFLINE forbids writing to {place}; unset it, or name a directory."]
    if (token := find_token(token)) is None:
        return [f"Writing to {place} needs a token; set HF_TOKEN, or run `hf auth login`."]
    try:
        api, name = HfApi(token=token), repository_name(place)
        return ask(name, RETRIES, lambda: list(_problems(api, name, overwrite, public)))
    except Exception as error:
        error = _refused(error, repository_name(place), token)
        if not isinstance(error, UserError):
            raise error from None
        return list(error.problems)


def _problems(api: HfApi, name: str, overwrite: bool, public: bool) -> Iterator[str]:
    me = api.whoami()
    try:
        info = api.model_info(name)
    except RepositoryNotFoundError:
        if (problem := _no_place(me, name.partition("/")[0])) is not None:
            yield problem
        return
    _ask_to_write(api, name)
    if info.private and public:
        yield (
            f"{SCHEME}{name} exists and is private; make it public in its settings, or remove "
            "--public."
        )
    if not overwrite and _step_files(info):
        yield _exists(name)


def _exists(name: str) -> str:
    return (
        f"{SCHEME}{name}/{place.STEP} exists; add --overwrite to replace it, or name another "
        "repository."
    )


def _no_place(me: Mapping[str, Any], org: str) -> str | None:
    """Why this user cannot create a repository, as far as that is known in advance."""
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return _may_not_write(f"{SCHEME}{org}")
    mine = [me.get("name"), *(o["name"] for o in me.get("orgs", ()) if _writes_in(o))]
    return None if org in mine else _may_not_write(f"{SCHEME}{org}")


def _writes_in(org: Mapping[str, Any]) -> bool:
    return org.get("roleInOrg") != "read"


def _ask_to_write(api: HfApi, name: str) -> None:
    """Checks write access, with a request for the upload mode of a file."""
    api.preupload_lfs_files(name, [CommitOperationAdd(f"{place.STEP}/_", b"{}")])


def _step_files(info: Any) -> set[str]:
    files = {file.rfilename for file in info.siblings or ()}
    return {file for file in files if file.startswith(f"{place.STEP}/")}


class Publication:
    """Uploads a checkpoint to a repository. Process 0 does; others only use `wait_for_room`.

    `overwrite`: whether it may replace a checkpoint that is there when it begins.
    """

    def __init__(
        self, place: str, token: str | None, max_retries: int, public: bool, overwrite: bool
    ):
        self.place, self.scratch = place, Path(scratch(place))
        self.name, self._public, self._retries = repository_name(place), public, max_retries
        self._overwrite, self._replaced = overwrite, set[str]()
        self._token = find_token(token)
        self._api = HfApi(token=self._token)
        self._operations: dict[str, CommitOperationAdd] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._error: Exception | None = None
        self.made: str | None = None  # the id of the commit

    def begin(self) -> list[str]:
        """Creates the repository and starts uploading; returns notices for the user."""
        disable_progress_bars()
        logging.set_verbosity_error()  # its warnings contain signed URLs
        is_public = self._persistently(self._create)
        self._thread.start()
        return [f"{self.place} is public."] if is_public and not self._public else []

    def _create(self) -> bool:
        """Creates the repository if it does not exist; returns whether it is public."""
        self._api.create_repo(self.name, private=not self._public, exist_ok=True)
        _ask_to_write(self._api, self.name)
        info = self._api.model_info(self.name)
        self._replaced = _step_files(info)
        if self._replaced and not self._overwrite:  # it came since it was looked at before
            raise UserError(_exists(self.name))
        return not info.private

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
        sizes = {a.path_in_repo: nbytes(a) for a in additions}
        self.made = self._persistently(lambda: self._commit(additions, sizes.keys()))
        self._look(self.made, sizes)

    def _commit(self, additions: list[CommitOperationAdd], files: Set[str]) -> str:
        """Replaces what was there at the beginning in one commit, and returns its id.

        Each attempt is for the repository as it was looked at, or the Hub refuses it (412).
        """
        message = f"MaxText checkpoint, {len(files)} files, by maxconv"
        for attempt in range(RETRIES):
            info = self._api.model_info(self.name)
            there = _step_files(info)
            if info.sha and files <= there:  # made, but the answer was lost: names are random
                return info.sha
            if came := sorted(there - self._replaced):
                raise ConversionError(
                    f"{SCHEME}{self.name}/{came[0]} and {len(came) - 1} more files were added by "
                    "someone else during the conversion, so the checkpoint was not committed; use "
                    "another repository, or remove these files and convert again."
                )
            deletions = [CommitOperationDelete(file) for file in sorted(there - files)]
            try:
                return self._api.create_commit(
                    self.name,
                    [*deletions, *additions],
                    commit_message=message,
                    parent_commit=info.sha,
                ).oid
            except HfHubHTTPError as error:
                if error.response.status_code != 412 or attempt == RETRIES - 1:
                    raise
        raise AssertionError("every attempt returns or raises")

    def whole(self, item: Item, commit: str) -> Item:
        """The checkpoint at a commit of the repository, from which values are fetched."""
        files = HubSource(self.name, commit, self._token, self._retries, config=None)
        return HollowItem.of(item, lambda file, *what: files.fetch(f"{_ITEMS}/{file}", *what))

    def close(self) -> None:
        """Stops uploading, and removes the staged files."""
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def _look(self, commit: str, sizes: Mapping[str, int]) -> None:
        info = self._persistently(
            lambda: self._api.model_info(self.name, revision=commit, files_metadata=True)
        )
        there = {file.rfilename: file.size for file in info.siblings or ()}
        if wrong := sorted(file for file, size in sizes.items() if there.get(file) != size):
            raise ConversionError(
                f"{self.place} has {wrong[0]} and {len(wrong) - 1} more files that differ "
                "from what was sent; check its .gitignore, and convert again."
            )

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
        nbytes = sum(addition.upload_info.size for addition in additions)
        try:
            upload = partial(self._api.preupload_lfs_files, self.name, additions)
            self._persistently(upload, nbytes)
        except Exception as error:
            if not files[0].exists():  # Orbax has renamed its directory
                raise FileNotFoundError(str(error)) from None
            raise
        for addition in additions:
            if not is_uploaded(addition):
                raise ConversionError(
                    f"{self.place} does not accept {addition.path_in_repo} as a large file; check "
                    "its .gitattributes."
                )
            self._operations[addition.path_in_repo] = addition

    def _persistently(self, action: Callable[[], T], nbytes: int = 0) -> T:
        """Makes a request with retries; `nbytes`: bytes that it uploads, for its timeout."""
        try:
            return ask(self.name, self._retries, action, nbytes)
        except Exception as error:
            raise _refused(error, self.name, self._token) from None


def repository_name(place: str) -> str:
    return place.removeprefix(SCHEME).rstrip("/")


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


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer that caused an error, if any."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _refused(error: Exception, name: str, token: str | None) -> Exception:
    """A known error of writing as a sentence; an unknown one unchanged."""
    answer = _answer(error)
    if answer is not None and answer.response.status_code == 403:
        return UserError(_may_not_write(f"{SCHEME}{name}"))
    said = told(answer or error, name, None, token)
    if said is error and isinstance(error, RuntimeError):
        return RetryableError(f"The upload to {name} failed ({error}); try again.")
    return said


def _may_not_write(place: str) -> str:
    return (
        f"The token has no write access to {place}; create one that has at "
        f"{constants.ENDPOINT}/settings/tokens, or name a repository of your own."
    )
