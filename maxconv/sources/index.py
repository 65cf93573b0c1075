"""Which files of a checkpoint hold which tensors, as transformers and PEFT choose them."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from maxconv.errors import UserError
from maxconv.sources.safetensors import StoredTensor, some

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

ADAPTER = "adapter_config.json"
_ADAPTERS_SINGLE = "adapter_model.safetensors"
STATED = "transformers_weights"  # the entry of config.json that names a file or an index
_OTHER_FORMATS = (".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")
_ORBAX = {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "items"}

Headers = Mapping[str, Sequence[StoredTensor]]  # by file


class Choice(NamedTuple):
    """The files that hold the tensors of a checkpoint.

    Attributes:
        files: their names.
        where: the file of each tensor, if an index says so; else the files have them all.
        by: what decided: the name of a file, or an entry of config.json.
        problems: files that are not there.
    """

    files: Sequence[str]
    where: Mapping[str, str] | None = None
    by: str = "files with transformers' names"
    problems: Sequence[str] = ()


def choose(
    root: str,
    names: set[str],
    config: str,
    entries: Mapping[str, Any],
    read: Callable[[str], Mapping[str, Any]],
) -> Choice:
    """Chooses files in the order of transformers: the one that config.json names, a single file,
    those that an index lists; else all that may be a model's.

    Args:
        root: of the checkpoint, for messages.
        names: of its files.
        config: the file that describes it.
        entries: of that file.
        read: returns the content of an index.

    Raises:
        UserError: there are none, or the index is malformed.
    """
    stated = entries.get(STATED)
    if isinstance(stated, str):
        return _stated(root, names, config, stated, read)
    singles = (_ADAPTERS_SINGLE, SINGLE) if config == ADAPTER else (SINGLE,)
    if single := next((name for name in singles if name in names), None):
        return Choice([single], by=single)
    if INDEX in names and config != ADAPTER:
        return _listed(root, names, INDEX, read)
    return Choice(_all(root, of_the_model(names)))


def _stated(
    root: str,
    names: set[str],
    config: str,
    stated: str,
    read: Callable[[str], Mapping[str, Any]],
) -> Choice:
    by = f"{STATED}={stated} in {config}"
    if not stated.endswith((".safetensors", ".safetensors.index.json")) or stated not in names:
        raise UserError(
            f"{root} has {by}, but no such safetensors file or index; download it again, or "
            "correct the entry."
        )
    if stated.endswith(".json"):
        return _listed(root, names, stated, read)._replace(by=by)
    return Choice([stated], by=by)


def _listed(
    root: str, names: set[str], index: str, read: Callable[[str], Mapping[str, Any]]
) -> Choice:
    where = weight_map(read(index), index)
    listed = sorted(set(where.values()))
    missing = [file for file in listed if file not in names and "/" not in file]
    files = [file for file in listed if file not in missing]
    if not missing:
        return Choice(files, where, index)
    problem = (
        f"{index} in {root} lists tensors in {some(missing)}, not there: download the missing "
        f"files, or remove {index} if the other files hold all tensors."
    )
    return Choice(files, where, index, (problem,))


def weight_map(content: Mapping[str, Any], index: str = INDEX) -> dict[str, str]:
    """Which file holds each tensor, as an index says.

    Raises:
        UserError: it has no weight_map, or names files outside its directory.
    """
    files = content.get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{index} has no weight_map; download it again.")
    if others := [name for name, file in files.items() if not isinstance(file, str)]:
        raise UserError(f"{index} has no file name for {some(others)}; download it again.")
    # Links are not followed here: the Hugging Face cache links to blobs outside the directory.
    if bad := {file for file in files.values() if not _is_beside(file)}:
        raise UserError(
            f"{index} names {some(sorted(bad))}; it may only name files in its own directory."
        )
    return files


def _is_beside(file: str) -> bool:
    return not file.startswith("/") and ".." not in PurePosixPath(file).parts


def of_the_model(names: set[str]) -> set[str]:
    """The names of files that may be a model's: none that an operating system left, none below
    other directories, no adapter beside it, and not the same weights once more under their
    authors' own names."""
    own = {name for name in names if not name.startswith(".") and "/" not in name}
    weights = {name for name in own if name.endswith(".safetensors")}
    others = {name for name in weights if name.startswith(("consolidated", "adapter_model"))}
    return own - others if weights - others else own


def check_kind(root: str, names: set[str], config: str) -> None:
    """UserError when a directory is something else than what `config` would describe."""
    if config in names:
        return
    if ADAPTER in names:
        raise UserError(
            f"{root} is a LoRA adapter: give it as hf_lora_adapter_path=, and the model that it is "
            "of as --hf_model_path="
        )
    if config == ADAPTER and "config.json" in names:
        raise UserError(
            f"{root} is a model, not a LoRA adapter: give the directory that holds {ADAPTER}"
        )
    if {"snapshots", "blobs"} <= names:
        raise UserError(
            f"{root} is the Hugging Face cache of a model: give one of the directories in its "
            "snapshots/, or the name of the model"
        )
    if any(name.startswith("models--") for name in names):
        raise UserError(
            f"{root} is the Hugging Face cache: give the name of a model, org/name, or a directory "
            "in the snapshots/ of one"
        )


def _all(root: str, names: set[str]) -> Sequence[str]:
    """All files of a directory without an index; UserError if it has none."""
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


def check_index(headers: Headers, choice: Choice) -> list[str]:
    """A problem for each file that lacks tensors that the index lists in it."""
    holders: defaultdict[str, set[str]] = defaultdict(set)
    for file, infos in headers.items():
        for info in infos:
            holders[info.name].add(file)
    lost: defaultdict[str, list[str]] = defaultdict(list)
    for name, file in (choice.where or {}).items():
        # A file that could not be read is reported separately.
        if file in headers and file not in holders.get(name, ()):
            lost[file].append(name)
    problems: list[str] = []
    for file, names in lost.items():
        others = sorted(set().union(*(holders.get(name, ()) for name in names)))
        where = f" ({some(others)} does)" if others else ""
        problems.append(
            f"{choice.by} lists {some(names)} in {file}, which does not hold them{where}; download "
            "both again."
        )
    return problems


def notices(
    root: str, names: set[str], headers: Headers, read: Mapping[str, StoredTensor], by: str
) -> list[str]:
    """Notices about files and tensors in the directory that are not read; `by`: see `Choice`."""
    found: list[str] = []
    infos = [info for header in headers.values() for info in header]
    if unnamed := [info.name for info in infos if read.get(info.name) != info]:
        found.append(
            f"{len(unnamed)} tensors are not read, because {by} does not list them in the files "
            f"that hold them: {some(unnamed)}."
        )
    weights = {n for n in names if n.endswith(".safetensors") and not n.startswith(".")}
    if unread := sorted(weights - headers.keys()):
        found.append(f"{root} has {by}, so {some(unread)} is not read.")
    return found
