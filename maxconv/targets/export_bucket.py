"""An export to a bucket of Google Cloud Storage."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from maxconv.errors import ConversionError, RetryableError, UserError
from maxconv.processes.agreement import once
from maxconv.sources import FileSource, http, open_source
from maxconv.targets import place
from maxconv.targets.export_staged import StagedExport
from maxconv.targets.shards import Contents, File, is_weights

T = TypeVar("T")

UNFINISHED = "maxconv.unfinished/"  # prefix of what is not yet part of a checkpoint
_COMMIT = f"{UNFINISHED}commit"  # says that files were being put in their places
_CHUNK = 16 << 20  # bytes of an upload that are held at once
_AT_ONCE = 16  # requests


class BucketExport(StagedExport):
    """Files are sent to objects beside their places, and copied within the bucket at the end.

    Such copies move no data over the network.
    """

    def __init__(self, where: str, contents: Contents, overwrite: bool, max_retries: int):
        super().__init__(where, contents, overwrite)
        self._max_retries, self._before = max_retries, set[str]()

    @cached_property
    def _fs(self) -> Any:
        import fsspec

        return fsspec.filesystem("gs")

    @property
    def lock(self) -> str:
        return f"{self.place}/maxconv.lock"

    def problems(self) -> list[str]:
        try:
            names = place.objects_in(self.place).keys()
        except UserError as error:
            return list(error.problems)
        if _COMMIT in names:  # what is there is ours, or was to be replaced
            return []
        return self.there_problems(names, "directory")

    def _prepare(self) -> tuple[str, ...]:
        def clear() -> None:
            names = place.objects_in(self.place, to_write=False).keys()
            staged = {name for name in names if name.startswith(UNFINISHED)}
            self._before = names - staged
            self._remove(staged)

        once(clear)
        return ()

    def _send(self, file: File, path: Path) -> None:
        there = self._object(f"{UNFINISHED}{file.name}")
        self._ask(lambda: self._fs.put_file(str(path), there, chunksize=_CHUNK), file.nbytes)

    def _commit(self) -> None:
        now = place.objects_in(self.place, to_write=False)
        self.check_nobody_came(self._before, now)
        for file in self.contents.files:
            found = now.get(f"{UNFINISHED}{file.name}")
            if found is None or found.size != file.nbytes:
                raise ConversionError(
                    f"{file.name} in {self.place} is not what was sent; export again."
                )
        self._put(_COMMIT, b"")
        self._remove(filter(is_weights, now))
        key, small = self.contents.key, self.contents.small
        weights = [file.name for file in self.contents.files]
        self._copy(name for name in weights if name != key)
        for name in sorted(small.keys() - {key}):
            self._put(name, small[name])
        if key in small:
            self._put(key, small[key])
        else:
            self._copy([key])
        self._remove([_COMMIT, *(f"{UNFINISHED}{name}" for name in weights)])

    def opened(self) -> FileSource:
        return open_source(self.place, config=self.contents.config, max_retries=self._max_retries)

    # ---- requests

    def _object(self, name: str) -> str:
        return f"{self.place.removeprefix('gs://')}/{name}"

    def _put(self, name: str, content: bytes) -> None:
        self._ask(lambda: self._fs.pipe_file(self._object(name), content), len(content))

    def _copy(self, names: Iterable[str]) -> None:
        """Copies staged objects to their places."""

        def copy(name: str) -> None:
            staged = self._object(f"{UNFINISHED}{name}")
            self._fs.cp_file(staged, self._object(name))

        self._each(copy, names)

    def _remove(self, names: Iterable[str]) -> None:
        def remove(name: str) -> None:
            try:
                self._fs.rm_file(self._object(name))
            except FileNotFoundError:  # as a retry finds
                pass

        self._each(remove, names)

    def _each(self, act: Callable[[str], None], names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(lambda name: self._ask(lambda: act(name)), names):
                pass

    def _ask(self, call: Callable[[], T], nbytes: int = 0) -> T:
        """A call of gcsfs, which retries by itself, with a bound on its time.

        Raises:
            RetryableError, ConversionError: it failed.
        """
        from gcsfs.retry import is_retriable

        try:
            return http.within(http.CALL + nbytes / http.UPLOAD, call)
        except Exception as error:
            why = str(error).partition("\n")[0] or type(error).__name__
            if isinstance(error, ConnectionError | TimeoutError) or is_retriable(error):
                raise RetryableError(
                    f"Writing to {self.place} failed ({why}); try again."
                ) from None
            raise ConversionError(
                f"{self.place} cannot be written to ({why}); check your access to it."
            ) from None
