"""Checkpoints in a local directory."""

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from random import Random
from threading import Lock

from maxconv.errors import UserError
from maxconv.sources.base import TensorInfo
from maxconv.sources.files import FileSource
from maxconv.sources.safetensors import PREFIX, StoredTensor, check_size, header_length, some

SAMPLES = 8  # blocks of a file that its fingerprint covers
SAMPLE = 64 << 10  # bytes per block


class LocalSource(FileSource):
    """A directory as `hf download` creates it, or a snapshot in the Hugging Face cache.

    Files are opened for the headers, and again by the first read of a tensor. `config` names the
    file that describes the model.

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
        with self._opened(file) as (opened, size):
            check_size(size, f"{file} in {self._directory}")
            return _read(opened, size)

    def _header(self, file: str) -> tuple[bytes, int]:
        with self._opened(file) as (opened, size):
            raw = _read(opened, PREFIX)
            return raw + _read(opened, header_length(raw, size)), size

    @contextmanager
    def _opened(self, file: str) -> Iterator[tuple[int, int]]:
        """A file descriptor and the file's size; raises UserError."""
        with _reading(f"{file} in {self._directory}"):
            opened = _open(self._directory / file)
            try:
                yield opened, os.fstat(opened).st_size
            finally:
                os.close(opened)

    def _fetch(
        self, stored: StoredTensor, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        try:
            file = self._file(stored.file)
            for i, offset in enumerate(offsets):
                _fill(file, buffer[i * nbytes : (i + 1) * nbytes], offset)
        except EOFError:
            raise OSError(
                f"{stored.file} in {self.root} was truncated while it was being read (tensor "
                f"{stored.name!r}); a checkpoint must not change while it is being converted."
            ) from None
        except OSError as error:
            error.add_note(
                f"while reading tensor {stored.name!r} from {stored.file} in {self.root}"
            )
            raise

    def path(self, info: TensorInfo) -> Path:
        return self._directory / self.stored[info.name].file

    def versions(self) -> dict[str, str]:
        """Size and modification time of every file that has tensors."""
        stats = {file: (self._directory / file).stat() for file in self.files}
        return {
            file: f"{stat.st_size} bytes, modified {datetime.fromtimestamp(stat.st_mtime)}"
            for file, stat in stats.items()
        }

    def fingerprints(self) -> Mapping[str, str]:
        """A digest of each file: config.json and the index as a whole; of files with tensors, the
        header and samples of the data.

        Reads up to 512 KiB per file (`SAMPLES` blocks of `SAMPLE` bytes). The offsets depend on the
        file's size only, so that copies on several hosts are compared at the same offsets.
        """
        data = dict.fromkeys(self.files)
        whole = {file: digest for file, digest in self._digests.items() if file not in data}
        with ThreadPoolExecutor(SAMPLES) as pool:
            return whole | dict(zip(data, pool.map(self._fingerprint, data), strict=True))

    def _fingerprint(self, file: str) -> str:
        digest = hashlib.sha256(self._digests[file].encode())
        with self._opened(file) as (opened, size):
            digest.update(size.to_bytes(8, "little"))
            for start, stop in sample_spans(size):
                digest.update(os.pread(opened, stop - start, start))
        return digest.hexdigest()

    def _file(self, file: str) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = _open(self._directory / file)
            return self._files[file]

    def close(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])


def sample_spans(size: int) -> Iterator[tuple[int, int]]:
    """Start and end of each sample in a file of `size` bytes: one per `SAMPLES`th of the file."""
    random = Random(size)
    for i in range(SAMPLES):
        first, last = i * size // SAMPLES, (i + 1) * size // SAMPLES
        start = random.randint(first, max(first, last - SAMPLE))
        yield start, min(start + SAMPLE, last)


def _open(path: Path) -> int:
    """Opens a regular file; others, such as pipes and devices, might block or never end.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block here
    except ValueError as error:  # a name that no file can have
        raise OSError(0, str(error)) from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        is_directory = stat.S_ISDIR(os.fstat(file).st_mode)
        os.close(file)
        raise OSError(0, f"it is {'a directory' if is_directory else 'not a regular file'}")
    return file


def _read(file: int, nbytes: int) -> bytes:
    """Reads `nbytes` bytes from the current position, or fewer at the end of the file."""
    parts: list[bytes] = []
    while nbytes and (part := os.read(file, nbytes)):
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


def _fill(file: int, buffer: memoryview, offset: int) -> None:
    """Fills a whole buffer; EOFError if the file ends before that."""
    while buffer:  # one call reads 2 GiB at most
        count = os.preadv(file, [buffer], offset)
        if not count:
            raise EOFError
        buffer, offset = buffer[count:], offset + count


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turns errors of the file system into a UserError."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{name} does not exist; check the path, or download it first.") from None
    except PermissionError:
        raise UserError(f"{name} is not readable by this user; change its permissions.") from None
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
    """A problem if there are unfinished downloads of huggingface_hub."""
    places = directory, directory / ".cache/huggingface/download"
    found = sorted(path.name for place in places for path in place.glob("*.incomplete"))
    if not found:
        return []
    return [
        f"{directory} holds unfinished downloads ({some(found)}); run `hf download` "
        "again, or delete them."
    ]
