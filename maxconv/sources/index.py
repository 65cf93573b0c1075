"""Which files of a checkpoint hold which tensors: according to its index, or else all files."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from maxconv.errors import UserError
from maxconv.sources.safetensors import StoredTensor, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_ADAPTER = "adapter_config.json"
_OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "items"}

Headers = Mapping[str, Sequence[StoredTensor]]  # by file


def weight_map(index: Mapping[str, Any]) -> dict[str, str]:
    """Which file holds each tensor, as the index says.

    Raises:
        UserError: it has no weight_map, or names files outside its directory.
    """
    files = index.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{INDEX} has no weight_map; download it again.")
    if others := [name for name, file in files.items() if not isinstance(file, str)]:
        raise UserError(f"{INDEX} has no file name for {some(others)}; download it again.")
    # Links are not followed here: the Hugging Face cache links to blobs outside the directory.
    if bad := {file for file in files.values() if not _is_beside(file)}:
        raise UserError(
            f"{INDEX} names {some(sorted(bad))}; it may only name files in its own directory."
        )
    return files


def _is_beside(file: str) -> bool:
    return not file.startswith("/") and ".." not in PurePosixPath(file).parts


def of_the_model(names: set[str]) -> set[str]:
    """The names of files that may be a model's: none that an operating system left, none below
    other directories, and not the same weights once more under their authors' own names."""
    own = {name for name in names if not name.startswith(".") and "/" not in name}
    weights = {name for name in own if name.endswith(".safetensors")}
    once_more = {name for name in weights if name.startswith("consolidated")}
    return own - once_more if weights - once_more else own


def check_kind(root: str, names: set[str], config: str) -> None:
    """UserError when a directory is something else than what `config` would describe."""
    if config in names:
        return
    if _ADAPTER in names:
        raise UserError(
            f"{root} is a LoRA adapter: give it as hf_lora_adapter_path=, and the model that it is "
            "of as --hf_model_path="
        )
    if config == _ADAPTER and "config.json" in names:
        raise UserError(
            f"{root} is a model, not a LoRA adapter: give the directory that holds {_ADAPTER}"
        )
    if {"snapshots", "blobs"} <= names:
        raise UserError(
            f"{root} is the Hugging Face cache of a model: give one of the directories in its "
            "snapshots/, or the name of the model"
        )


def choose_files(root: str, names: set[str], weight_map: Mapping[str, str] | None) -> Sequence[str]:
    """The files to read; UserError if the directory has none."""
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
            f"{root} is an Orbax checkpoint, the output of a conversion; give the Hugging Face "
            "checkpoint to convert."
        )
    raise UserError(f"{root} has no .safetensors files; give the directory of a checkpoint.")


def check_distinct(headers: Headers) -> list[str]:
    """A problem for each pair of files that hold the same tensors, if there is no index."""
    first: dict[str, str] = {}
    twice: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for file, infos in headers.items():
        for info in infos:
            if file != first.setdefault(info.name, file):
                twice[first[info.name], file].append(info.name)
    return [
        f"{one} and {other} both hold {some(names)}; delete one of the files, or add a {INDEX} "
        "that selects one."
        for (one, other), names in twice.items()
    ]


def check_index(headers: Headers, weight_map: Mapping[str, str]) -> list[str]:
    """A problem for each file that lacks tensors that the index lists in it."""
    holders: defaultdict[str, set[str]] = defaultdict(set)
    for file, infos in headers.items():
        for info in infos:
            holders[info.name].add(file)
    lost: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        # A file that could not be read is reported separately.
        if file in headers and file not in holders.get(name, ()):
            lost[file].append(name)
    problems: list[str] = []
    for file, names in lost.items():
        others = sorted(set().union(*(holders.get(name, ()) for name in names)))
        where = f" ({some(others)} does)" if others else ""
        problems.append(
            f"{INDEX} lists {some(names)} in {file}, which does not hold them{where}; download "
            "both again."
        )
    return problems


def notices(
    root: str, names: set[str], headers: Headers, read: Mapping[str, StoredTensor]
) -> list[str]:
    """Notices about files and tensors in the directory that are not read."""
    found: list[str] = []
    infos = [info for header in headers.values() for info in header]
    if unnamed := [info.name for info in infos if read.get(info.name) != info]:
        found.append(
            f"{len(unnamed)} tensors are not read, because {INDEX} does not list them in the files "
            f"that hold them: {some(unnamed)}."
        )
    weights = {n for n in names if n.endswith(".safetensors") and not n.startswith(".")}
    if unread := sorted(weights - headers.keys()):
        others = (name for name in (INDEX, SINGLE) if name in names)
        reason = next(others, "files with transformers' names")
        found.append(f"{root} has {reason}, so {some(unread)} is not read.")
    return found
