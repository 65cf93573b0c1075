"""Compares the files of an exported checkpoint with what they should be, apart from the data.

Which tensors are in which file is read from the files: it depends on who wrote them.
"""

import json
from collections.abc import Iterable, Mapping

from etils import epath

from maxconv.errors import UserError
from maxconv.sources.safetensors import PREFIX, header_length, parse_header, some
from maxconv.targets import shards
from maxconv.targets.shards import INDEX, File, Tensor


def file_problems(
    directory: epath.Path, tensors: Iterable[Tensor], others: Mapping[str, bytes]
) -> dict[str, str]:
    """A sentence for each file that is not as an export writes it, by the file's name.

    Args:
        directory: of the checkpoint.
        tensors: that it should have.
        others: the contents of the files beside those of weights and their index.
    """
    left, where = {tensor.name: tensor for tensor in tensors}, _where(directory)
    files, found = list[File](), dict[str, str]()
    for name in sorted({*where.values(), *shards.weights(directory)}):
        if (directory / name).exists():
            try:
                files.append(_file(directory / name, left))
            except UserError as error:
                found[name] = error.problems[0]
    missing = {where[name] for name in left if name in where} - found.keys()
    found |= {name: f"{name} is missing." for name in sorted(missing)}
    if left and not found:
        found[str(directory)] = f"{directory} lacks {some(sorted(left))}."
    if not found:
        others = {**others, **shards.index_file(files)}
    elif not where and {file.name for file in files} != {shards.ALONE}:
        found[INDEX] = f"{INDEX} is missing, or damaged."
    if INDEX not in others and not found and (directory / INDEX).exists():
        found[INDEX] = f"{INDEX} does not belong to it."
    return found | _differences(directory, others)


def _differences(directory: epath.Path, contents: Mapping[str, bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, content in contents.items():
        if not (directory / name).exists():
            found[name] = f"{name} is missing."
        elif (directory / name).read_bytes() != content:
            found[name] = f"{name} is not what the export made it."
    return found


def _where(directory: epath.Path) -> dict[str, str]:
    """The file of each tensor as the index has it; nothing if there is none, or it is damaged."""
    try:
        where = json.loads((directory / INDEX).read_bytes())["weight_map"]
        return {name: file for name, file in where.items() if "/" not in file}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _file(path: epath.Path, left: dict[str, Tensor]) -> File:
    """A file of weights as its header has it; takes its tensors from those that are left.

    Raises:
        UserError: it is not one that an export writes.
    """
    size = path.stat().length
    with path.open("rb") as opened:
        raw = opened.read(PREFIX)
        raw += opened.read(header_length(raw, size))
    try:
        stored = sorted(parse_header(raw, path.name, size), key=lambda tensor: tensor.offset)
    except UserError:
        raise UserError(f"{path.name} is damaged or truncated.") from None
    tensors = tuple(Tensor(info.name, info.dtype, info.shape) for info in stored)
    if wrong := [tensor.name for tensor in tensors if left.get(tensor.name) != tensor]:
        raise UserError(f"{path.name} has tensors that it should not have: {some(wrong)}.")
    file = File(path.name, 0, tensors)
    if file.header != raw:
        raise UserError(f"{path.name} has another header than an export writes.")
    for tensor in tensors:
        del left[tensor.name]
    return file
