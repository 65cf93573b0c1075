"""Checkpoints as directories of files, wherever these lie."""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any

from maxconv.errors import UserError
from maxconv.sources.base import Source
from maxconv.sources.safetensors import TensorInfo, check_lfs, load_object, parse_header, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "items"}


class FileSource(Source, ABC):
    """A directory of safetensors files beside a config.json.

    The tensors are those of model.safetensors.index.json, else of model.safetensors, else of all
    *.safetensors. Only headers are read here. A subclass says what is there and reads it.
    """

    def _examine(self, config: str, problems: Sequence[str] = ()) -> None:
        """Fills in what is known of a source, from the file `config` and all headers.

        Raises:
            UserError: with everything that is wrong with the directory, `problems` among it.
        """
        names, problems = self._names(), list(problems)
        with _collect(problems):
            self.config = self._object(config)
        weight_map: dict[str, str] | None = None
        files: Sequence[str] = []
        with _collect(problems):
            if INDEX in names:
                weight_map = _weight_map(self._object(INDEX))
            files = _choose_files(self.root, names, weight_map)
        headers: dict[str, tuple[TensorInfo, ...]] = {}
        for file in files:
            with _collect(problems):
                raw, size = self._header(file)
                headers[file] = parse_header(raw, file, size)
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

    def _object(self, file: str) -> dict[str, Any]:
        raw = self._content(file)
        check_lfs(raw, file)
        problems: list[str] = []
        value = load_object(raw, file, problems)
        if problems:
            raise UserError(problems)
        return value

    @abstractmethod
    def _names(self) -> set[str]:
        """The names of the files."""

    @abstractmethod
    def _content(self, file: str) -> bytes:
        """The whole of a small file; UserError when it cannot be read."""

    @abstractmethod
    def _header(self, file: str) -> tuple[bytes, int]:
        """The first bytes of a safetensors file, up to its data, and the file's size."""


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Puts off a UserError, so that the problems after it are found too."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def _weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Which file holds each tensor."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{INDEX} has no weight_map; download it again.")
    # Where links lead is not asked: the Hugging Face cache links to blobs outside the directory.
    bad = {str(file) for file in weight_map.values() if not _is_beside(file)}
    if bad:
        raise UserError(f"{INDEX} names {some(sorted(bad))}; it may name files beside it only.")
    return weight_map


def _is_beside(file: object) -> bool:
    return (
        isinstance(file, str) and not file.startswith("/") and ".." not in PurePosixPath(file).parts
    )


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
