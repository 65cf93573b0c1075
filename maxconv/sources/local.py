"""Checkpoints in a local directory."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Lock

from maxconv.errors import UserError
from maxconv.sources.files import FileSource
from maxconv.sources.safetensors import PREFIX, TensorInfo, header_length, some


class LocalSource(FileSource):
    """A directory as `hf download` leaves it, or a snapshot in the Hugging Face cache.

    A file is opened again by the first read from it. `config` is the file that its `config` comes
    from.

    Raises:
        UserError: with everything that is wrong with the directory.
    """

    def __init__(self, directory: str | os.PathLike[str], config: str = "config.json"):
        super().__init__()
        self.root = os.fspath(directory)
        self._directory = Path(directory)
        self._files: dict[str, int] = {}  # file descriptors
        self._lock = Lock()
        # In the Hugging Face cache a snapshot is named after its commit.
        snapshot = self._directory.absolute()
        self.revision = snapshot.name if snapshot.parent.name == "snapshots" else None
        _list(self._directory)
        self._examine(config, _check_downloads(self._directory))

    def _names(self) -> set[str]:
        return _list(self._directory)

    def _content(self, file: str) -> bytes:
        with _reading(f"{file} in {self._directory}"):
            return (self._directory / file).read_bytes()

    def _header(self, file: str) -> tuple[bytes, int]:
        path = self._directory / file
        with _reading(f"{file} in {self._directory}"), open(path, "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            raw = opened.read(PREFIX)
            return raw + opened.read(header_length(raw, size)), size

    def _fetch(
        self, info: TensorInfo, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        try:
            file = self._open(info.file)
            for i, offset in enumerate(offsets):
                rest = buffer[i * nbytes : (i + 1) * nbytes]
                while rest:  # one call brings 2 GiB at most
                    count = os.preadv(file, [rest], offset)
                    if not count:
                        raise EOFError
                    rest, offset = rest[count:], offset + count
        except EOFError:
            raise OSError(
                f"{info.file} in {self.root} was truncated while it was read (tensor "
                f"{info.name!r}); nothing may change a checkpoint that is being converted."
            ) from None
        except OSError as error:
            error.add_note(f"while tensor {info.name!r} was read from {info.file} in {self.root}")
            raise

    def path(self, info: TensorInfo) -> Path:
        return self._directory / info.file

    def versions(self) -> dict[str, str]:
        """Size and time of every file that has tensors."""
        files = sorted({info.file for info in self.tensors.values()})
        stats = {file: (self._directory / file).stat() for file in files}
        return {
            file: f"{stat.st_size} bytes of {datetime.fromtimestamp(stat.st_mtime)}"
            for file, stat in stats.items()
        }

    def _open(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(self._directory / file, os.O_RDONLY | os.O_CLOEXEC)
            return self._files[file]

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns the errors of the file system into sentences."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; download it first.") from None
    except PermissionError:
        raise UserError(f"{name} may not be read by this user; change its permissions.") from None
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror}.") from None


def _list(directory: Path) -> set[str]:
    """The names in a directory."""
    with _reading(str(directory)):
        try:
            return set(os.listdir(directory))
        except NotADirectoryError:
            raise UserError(f"{directory} is a file; give the directory that holds it.") from None


def _check_downloads(directory: Path) -> list[str]:
    """Downloads by huggingface_hub that were never finished."""
    places = directory, directory / ".cache/huggingface/download"
    found = sorted(path.name for place in places for path in place.glob("*.incomplete"))
    if not found:
        return []
    return [
        f"{directory} holds downloads that were not finished ({some(found)}); run `hf download` "
        "again, or delete them."
    ]
