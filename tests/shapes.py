"""Checkpoints as data: config.json, and every tensor's shape, in a file that one can read.

A name holds ranges where layers or experts are alike: `model.layers.{0..3}.mlp.up_proj.weight`.
A shape may begin with the dtype, as safetensors names it, of a tensor that is not as the others.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F32": np.dtype(np.float32),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
}
DATA = Path(__file__).parent / "data"

Shapes = dict[str, list[Any]]


def load(path: Path) -> dict[str, Any]:
    """A file's content; under "tensors" the names are spelt out."""
    content = json.loads(path.read_text(encoding="utf-8"))
    shapes = content["tensors"]
    content["tensors"] = {name: shape for names, shape in shapes.items() for name in expand(names)}
    return content


def dump(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a file, with alike names in one line."""
    short = collapse(content["tensors"])
    lines = [f"  {json.dumps(name)}: {json.dumps(shape)}" for name, shape in short.items()]
    others = {key: value for key, value in content.items() if key != "tensors"}
    head = json.dumps(others, indent=1).removesuffix("\n}")
    path.write_text(head + ',\n "tensors": {\n' + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


def split(shape: list[Any]) -> tuple[np.dtype | None, tuple[int, ...]]:
    """The dtype that a shape begins with, if any, and the shape alone."""
    if shape and isinstance(shape[0], str):
        return DTYPES[shape[0]], tuple(shape[1:])
    return None, tuple(shape)


def expand(names: str) -> Iterator[str]:
    """The names that one with ranges stands for."""
    texts = re.split(r"\{[^}]*\}", names)
    ranges = [list(_numbers(found)) for found in re.findall(r"\{([^}]*)\}", names)]
    for numbers in itertools.product(*ranges):
        yield "".join(a + b for a, b in zip(texts, [*map(str, numbers), ""], strict=True))


def collapse(tensors: Mapping[str, list[Any]]) -> Shapes:
    """The same tensors with ranges, in the order in which each first appears."""
    groups: dict[tuple[str, str], set[tuple[int, ...]]] = {}
    for name, shape in tensors.items():
        text = re.sub(r"(?<=\.)\d+(?=\.|$)", "{}", name)
        numbers = tuple(int(n) for n in re.findall(r"(?<=\.)\d+(?=\.|$)", name))
        groups.setdefault((text, json.dumps(shape)), set()).add(numbers)
    return {
        text.format(*ranges): json.loads(shape)
        for (text, shape), found in groups.items()
        for ranges in _grids(found)
    }


def _grids(found: set[tuple[int, ...]]) -> Iterator[tuple[str, ...]]:
    """Grids, a range for each place, that have just these numbers between them."""
    axes = [sorted(set(axis)) for axis in zip(*found, strict=True)]
    if len(found) == len(list(itertools.product(*axes))):
        yield tuple(_ranges(axis) for axis in axes)
        return
    rows: dict[tuple[tuple[int, ...], ...], list[int]] = {}  # of the first numbers, those alike
    for first in axes[0]:
        rest = tuple(sorted(numbers[1:] for numbers in found if numbers[0] == first))
        rows.setdefault(rest, []).append(first)
    for rest, firsts in rows.items():
        yield from ((_ranges(firsts), *grid) for grid in _grids(set(rest)))


def _ranges(numbers: Iterable[int]) -> str:
    """`3` for one number, else `{0..2,5}`."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    if len(runs) == len(runs[0]) == 1:
        return str(runs[0][0])
    words = (f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(map(str, r)) for r in runs)
    return "{" + ",".join(words) + "}"


def _numbers(ranges: str) -> Iterator[int]:
    for part in ranges.split(","):
        first, _, last = part.partition("..")
        yield from range(int(first), int(last or first) + 1)
