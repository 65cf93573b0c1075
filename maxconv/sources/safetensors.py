"""The header of a safetensors file: 8 bytes of length, that many bytes of JSON, then the data."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from maxconv.errors import UserError

PREFIX = 8  # bytes of the little-endian header length
MAX_JSON = 100_000_000  # bytes of a header: the limit of the reference implementation
_MAX_VALUES = 10_000_000  # in a JSON file; each takes up to 200 bytes of memory
_MAX_COUNT = 1 << 63  # of elements and bytes
_MAX_AXES = 64  # numpy's limit

# Every whole-byte dtype of the format. F4, F6_E2M3 and F6_E3M2 pack elements across bytes, so that
# a slice of such a tensor need not begin at a byte.
DTYPES: dict[str, np.dtype] = {
    code: np.dtype(scalar)
    for code, scalar in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "C64": np.complex64,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file: C-order, little-endian, starting at byte `offset` of `file`.

    `file` is relative to the root of its source.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize


def header_length(prefix: bytes, file_size: int) -> int:
    """Bytes of JSON that follow the 8 bytes of `prefix`.

    0 if the length is invalid: then there is nothing to read, and `parse_header` reports why.
    """
    length = int.from_bytes(prefix[:PREFIX], "little")
    return length if length <= min(MAX_JSON, file_size - PREFIX) else 0


def parse_header(raw: bytes, file: str, file_size: int) -> tuple[StoredTensor, ...]:
    """The tensors of a file, in the order of its header.

    As strict as the reference implementation (the data must be covered without holes or overlaps
    from the header to the end of the file), and stricter about duplicate names.

    Args:
        raw: the first 8 bytes of the file and the `header_length` bytes after them.
        file: its name, for messages and `StoredTensor.file`.
        file_size: bytes in the whole file.

    Raises:
        UserError: with everything that is wrong with the header.
    """
    problems: list[str] = []
    header = _load(raw, file, file_size, problems)
    data = PREFIX + header_length(raw, file_size)
    tensors: list[StoredTensor] = []
    spans: list[tuple[int, int, str]] = []
    unknown: defaultdict[str, list[str]] = defaultdict(list)
    for name, entry in header.items():
        match entry:
            case {"dtype": str(code), "shape": [*shape], "data_offsets": [begin, end]} if (
                _are_counts(*shape, begin, end) and begin <= end and len(shape) <= _MAX_AXES
            ):
                spans.append((begin, end, name))
            case _:
                problems.append(
                    f"Tensor {name!r} of {file} has no valid dtype, shape and data_offsets; "
                    "download the file again."
                )
                continue
        if code not in DTYPES:
            unknown[code].append(name)
            continue
        info = StoredTensor(name, DTYPES[code], tuple(shape), file, data + begin)
        tensors.append(info)
        if info.nbytes != end - begin:
            problems.append(
                f"Tensor {name!r} of {file} has {end - begin} bytes, but {code}{shape} needs "
                f"{info.nbytes}; download the file again."
            )
    problems += _unknown_dtypes(unknown, file)
    if len(spans) == len(header):  # else the bytes of a broken entry are unknown
        problems += _check_layout(spans, file, data, file_size)
    if problems:
        raise UserError(problems)
    return tuple(tensors)


def _unknown_dtypes(unknown: Mapping[str, Sequence[str]], file: str) -> Iterator[str]:
    for code, names in unknown.items():
        yield (
            f"{file} holds {code} tensors ({some(names)}), a dtype that cannot be read; "
            f"use a checkpoint in one of {', '.join(DTYPES)}."
        )


def some(names: Iterable[str], limit: int = 3) -> str:
    """The first few names, quoted, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def load_object(
    raw: bytes, file: str, problems: list[str], contradictory: list[str] | None = None
) -> dict[str, Any]:
    """`raw` as a JSON object, of whose duplicate names the last counts.

    Args:
        raw: the contents of a file.
        file: its name, for messages.
        problems: a sentence about duplicate names is added here, unless
        contradictory: is given: the names of several different values are added here instead.

    Raises:
        UserError: if it is not a JSON object, or one that would fill the memory.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) == len(pairs):
            return result
        if contradictory is not None:
            contradictory.extend(key for key, value in pairs if value != result[key])
            return result
        twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
        problems.append(f"{file} has {some(twice)} more than once; download it again.")
        return result

    if sum(map(raw.count, (b"[", b"{", b","))) > _MAX_VALUES:  # every value follows one of these
        raise UserError(
            f"{file} has more than {_MAX_VALUES:,} values, which no checkpoint needs; download it "
            "again."
        )
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON ({error}); download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object; download it again.")
    return value


def check_size(nbytes: int, file: str) -> None:
    """Raises UserError if a JSON file is larger than any checkpoint needs."""
    if nbytes > MAX_JSON:
        raise UserError(
            f"{file} has {nbytes:,} bytes, more than the limit of {MAX_JSON:,} for a JSON file;"
            " download it again."
        )


def check_lfs(raw: bytes, file: str) -> None:
    """Raises UserError if `raw` starts like a Git LFS pointer."""
    # 8 bytes are enough: as a header length they would mean 2 exabytes.
    if raw.startswith(b"version "):
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` where it was "
            "cloned, or download it again with `hf download`."
        )


def _load(raw: bytes, file: str, file_size: int, problems: list[str]) -> dict[str, Any]:
    """The entry of each tensor in the header."""
    check_lfs(raw, file)
    if file_size < PREFIX:
        raise UserError(
            f"{file} has {file_size} bytes, too few for a safetensors file; download it again."
        )
    claimed = int.from_bytes(raw[:PREFIX], "little")
    if claimed > MAX_JSON:
        raise UserError(
            f"{file} is not a safetensors file (its first 8 bytes would mean a header of {claimed} "
            "bytes); download it again."
        )
    if claimed > file_size - PREFIX:
        raise UserError(
            f"{file} is truncated: its header alone takes {PREFIX + claimed} bytes, the file has "
            f"{file_size}; download it again."
        )
    header = load_object(raw[PREFIX : PREFIX + claimed], f"The header of {file}", problems)
    header.pop("__metadata__", None)
    return header


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and 0 <= value < _MAX_COUNT for value in values)


def _check_layout(
    spans: Sequence[tuple[int, int, str]], file: str, data: int, file_size: int
) -> list[str]:
    """Problems if the spans (begin, end, name) do not tile the bytes from `data` to the end."""
    problems: list[str] = []
    covered, previous = 0, ""
    for begin, end, name in sorted(spans):
        if begin > covered:
            problems.append(
                f"{file} has {begin - covered} bytes before tensor {name!r} that belong to no "
                "tensor; download it again."
            )
        elif begin < covered:
            problems.append(
                f"Tensors {previous!r} and {name!r} of {file} overlap; download it again."
            )
        if end >= covered:
            covered, previous = end, name
    expected = data + covered
    if file_size < expected:
        problems.append(
            f"{file} is truncated: its header describes {expected} bytes, the file has "
            f"{file_size}; download it again."
        )
    elif file_size > expected:
        problems.append(
            f"{file} has {file_size} bytes, {file_size - expected} more than its header describes; "
            "download it again."
        )
    return problems
