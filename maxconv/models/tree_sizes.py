"""What the leaves of a MaxText checkpoint say about the sizes of its model."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from maxconv.algebra import tensors
from maxconv.families import Parameter, Row, paths, stack_lengths
from maxconv.models.resolve import Model
from maxconv.sources.safetensors import some

ROOT = "params.params."  # before the names of MaxText's tree
_TABLE = "token_embedder.embedding"


class Shaped(Protocol):
    """Something that has a shape."""

    @property
    def shape(self) -> tuple[int, ...]: ...


Leaves = Mapping[str, Shaped]


def parts(leaves: Leaves) -> dict[str, Any]:
    """The vocabulary of a tree, and which parts of a model it has, as MaxText's arguments."""
    roots = {name.partition(".")[0] for name in leaves}
    predicted = {name.split(".")[1] for name in leaves if name.startswith("mtp_block.")}
    found: dict[str, Any] = {
        "use_multimodal": "vision_encoder" in roots,
        "use_audio": "audio_encoder" in roots,
        "mtp_num_layers": len({layer for layer in predicted if layer[-1:].isdigit()}),
    }
    if _TABLE in leaves:
        found["vocab_size"] = leaves[_TABLE].shape[0]
    return found


def layout(leaves: Leaves, model: Model, scan_axis: int) -> tuple[int, int | None]:
    """The number of decoder layers of a tree, and the axis along which they are stacked, if so.

    The number is the largest with which a model has just the leaves of the tree, up to that of the
    given model; if no number fits, that of the model.
    """
    for count in range(model.dims.layers, 0, -model.family.layers_per_block):
        rows = [*model.family.rows(replace(model.dims, layers=count))]
        for axis in (None, scan_axis):
            if _has_just(leaves, rows, axis):
                return count, axis
    return model.dims.layers, scan_axis if is_stacked(leaves, model.rows) else None


def is_stacked(names: Iterable[str], rows: Iterable[Row]) -> bool:
    """Whether names are rather those of a tree whose layers are stacked."""
    rows, names = list(rows), {*names}
    stacked, others = (len(_named(paths(rows, axis)) & names) for axis in (1, None))
    return stacked > others


def _named(found: Iterable[str]) -> set[str]:
    return {path.replace("/", ".") for path in found}


def _has_just(leaves: Leaves, rows: Iterable[Row], axis: int | None) -> bool:
    """Whether a tree has the leaves of a table and no others, and stacks of their lengths."""
    rows = list(rows)
    lengths = stack_lengths(rows, axis)
    needed = paths((r for r in rows if any(tensors(r.expr))), axis)
    if not _named(needed) <= leaves.keys() <= _named(lengths):
        return False
    return all(
        leaves[name].shape[at : at + 1] == (n,)
        for path, stacks in lengths.items()
        if (name := path.replace("/", ".")) in leaves
        for at, n in stacks.items()
    )


def differences(
    leaves: Leaves, bound: Iterable[Parameter], ours: str, theirs: str
) -> Iterator[str]:
    """Sentences about leaves that are missing, unexpected, or of other sizes: one for each size.

    Args:
        leaves: of the tree.
        bound: the parameters of the model.
        ours, theirs: the paths of the tree and of the model.
    """
    wanted = {p.name.removeprefix(ROOT): p for p in bound}
    if missing := sorted(
        name for name, p in wanted.items() if name not in leaves and any(tensors(p.expr))
    ):
        yield f"{ours} lacks {some(missing)}."
    if more := sorted(leaves.keys() - wanted.keys()):
        yield f"{ours} has {some(more)}, which this model has not."
    seen: dict[tuple[int, int], list[str]] = {}
    for name in sorted(leaves.keys() & wanted.keys()):
        here, there = leaves[name].shape, wanted[name].shape
        if len(here) != len(there):
            yield f"{name} in {ours} has shape {here}, but should have {there}."
            continue
        for one, other in zip(here, there, strict=True):
            if one != other:
                seen.setdefault((one, other), []).append(name)
    for (one, other), names in seen.items():
        yield f"{ours} has {one} where {theirs} has {other}: in {some(dict.fromkeys(names))}."
