"""Checkpoints in a local directory."""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Lock
from typing import Any

from maxconv.errors import UserError
from maxconv.sources.base import Source
from maxconv.sources.safetensors import (
    PREFIX,
    TensorInfo,
    check_lfs,
    header_length,
    load_object,
    parse_header,
    some,
)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "items"}


class LocalSource(Source):
    """A directory as `hf download` leaves it, or a snapshot in the Hugging Face cache.

    The tensors are those of model.safetensors.index.json, else of model.safetensors, else of all
    *.safetensors. Only headers are read here; a file is opened again by the first read from it.
    `config` is the file that its `config` comes from.

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

        names = _list(self._directory)
        problems = _check_downloads(self._directory)
        with _collect(problems):
            self.config = _read_object(self._directory, config)
        weight_map: dict[str, str] | None = None
        files: Sequence[str] = []
        with _collect(problems):
            if INDEX in names:
                weight_map = _read_index(self._directory)
            files = _choose_files(self.root, names, weight_map)
        headers: dict[str, tuple[TensorInfo, ...]] = {}
        for file in files:
            with _collect(problems):
                headers[file] = _read_header(self._directory, file)
        if weight_map is None:
            problems += _check_distinct(headers)
        else:
            problems += _check_index(headers, weight_map)
        if problems:
            raise UserError(problems)

        infos = [info for header in headers.values() for info in header]
        self.tensors = {
            info.name: info
            for info in infos
            if weight_map is None or weight_map.get(info.name) == info.file
        }
        self.notices = _notices(self.root, names, infos, self.tensors, files)

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
def _collect(problems: list[str]) -> Iterator[None]:
    """Puts off a UserError, so that the problems after it are found too."""
    try:
        yield
    except UserError as error:
        problems += error.problems


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


def _read_object(directory: Path, file: str) -> dict[str, Any]:
    with _reading(f"{file} in {directory}"):
        raw = (directory / file).read_bytes()
    check_lfs(raw, file)
    problems: list[str] = []
    value = load_object(raw, file, problems)
    if problems:
        raise UserError(problems)
    return value


def _read_index(directory: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    weight_map = _read_object(directory, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{INDEX} has no weight_map; download it again.")
    # Where links lead is not asked: the Hugging Face cache links to blobs outside the directory.
    bad = {str(file) for file in weight_map.values() if not _is_beside(file)}
    if bad:
        raise UserError(f"{INDEX} names {some(sorted(bad))}; it may name files beside it only.")
    return weight_map


def _is_beside(file: object) -> bool:
    return isinstance(file, str) and not file.startswith("/") and ".." not in Path(file).parts


def _choose_files(
    root: str, names: set[str], weight_map: Mapping[str, str] | None
) -> Sequence[str]:
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    if SINGLE in names:
        return [SINGLE]
    if files := sorted(name for name in names if name.endswith(".safetensors")):
        return files
    if found := sorted(name for name in names if name.endswith(_OTHER_FORMATS)):
        raise UserError(
            f"{root} has no .safetensors files, but {some(found)}; convert them to safetensors "
            "first, or download a revision that has them."
        )
    if names & _ORBAX:
        raise UserError(
            f"{root} holds an Orbax checkpoint, which is what maxconv writes; give the Hugging "
            "Face checkpoint to convert."
        )
    raise UserError(f"{root} has no .safetensors files; give the directory of a checkpoint.")


def _read_header(directory: Path, file: str) -> tuple[TensorInfo, ...]:
    with _reading(f"{file} in {directory}"), open(directory / file, "rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        raw = opened.read(PREFIX)
        raw += opened.read(header_length(raw, size))
    return parse_header(raw, file, size)


def _check_distinct(headers: Mapping[str, Sequence[TensorInfo]]) -> list[str]:
    """Tensors that come in two files, when no index says which one counts."""
    first: dict[str, str] = {}
    twice: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for file, infos in headers.items():
        for info in infos:
            if file != first.setdefault(info.name, file):
                twice[first[info.name], file].append(info.name)
    return [
        f"{one} and {other} both hold {some(names)}; delete one of the files, or add the "
        f"{INDEX} that says which to read."
        for (one, other), names in twice.items()
    ]


def _check_index(
    headers: Mapping[str, Sequence[TensorInfo]], weight_map: Mapping[str, str]
) -> list[str]:
    """Tensors that are not where the index puts them."""
    held = {file: {info.name for info in infos} for file, infos in headers.items()}
    lost: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        if file in held and name not in held[file]:  # a file that was not read has its own problem
            lost[file].append(name)
    problems: list[str] = []
    for file, names in lost.items():
        others = [other for other in held if not held[other].isdisjoint(names)]
        where = f" ({some(others)} does)" if others else ""
        problems.append(
            f"{INDEX} puts {some(names)} in {file}, which does not hold them{where}; download "
            "both again."
        )
    return problems


def _notices(
    root: str,
    names: set[str],
    infos: Sequence[TensorInfo],
    tensors: Mapping[str, TensorInfo],
    files: Sequence[str],
) -> list[str]:
    """What the directory holds besides the tensors."""
    notices: list[str] = []
    if unnamed := [info.name for info in infos if tensors.get(info.name) != info]:
        notices.append(
            f"{len(unnamed)} tensors are not read, because {INDEX} does not name them where they "
            f"are: {some(unnamed)}."
        )
    if unread := sorted({name for name in names if name.endswith(".safetensors")} - set(files)):
        reason = INDEX if INDEX in names else SINGLE
        notices.append(f"{root} has {reason}, so {some(unread)} is not read.")
    return notices
