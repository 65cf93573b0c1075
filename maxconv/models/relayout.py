"""The leaves of a tree in another layout, over those that it has.

A row stands for the same parameter in both layouts. Over a tensor for each of its layers, both can
be bound, and the first one inverted: only movement is left, so that the bits survive of whatever is
laid out like the parameters, such as moments, and of rows that were padded.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from maxconv.algebra import Expr, Shape, Tensor, invert, substitute
from maxconv.algebra.together import joined
from maxconv.errors import UserError
from maxconv.families import Layers, Parameter, Row, bind_rows, flat, paths, stack_lengths
from maxconv.models.tree_sizes import ROOT

_LAYERS, _LAYER = "{layers}", "{l}"  # in the path of a row, and in the name of a tensor


def scan_axis(scans: bool | None, along: int | None, was: int | None) -> int | None:
    """The axis along which layers are to be stacked; None if they are not.

    Args:
        scans, along: MaxText's scan_layers and param_scan_axis, if they are given.
        was: the axis so far, if layers are stacked.
    """
    if not (was is not None if scans is None else scans):
        return None
    return along if along is not None else 1 if was is None else was


class Leaf(NamedTuple):
    """A leaf in the new layout: its path, the names of its axes, and what it is over old leaves.

    `dtype`: if it is not that of the others.
    """

    path: str
    logical: tuple[str | None, ...]
    expr: Expr
    dtype: str | None = None


class Moved(NamedTuple):
    """The leaves of a new layout, and which of the old one are lost: what only some layers have, so
    that it cannot be stacked."""

    leaves: list[Leaf]
    lost: list[str]


def moved(
    old: Sequence[Row],
    new: Sequence[Row],
    shapes: Mapping[str, Shape],
    old_axis: int | None,
    new_axis: int | None,
) -> Moved:
    """Lays a tree out anew.

    Args:
        old, new: the tables of the model, which may have fewer layers in the new layout.
        shapes: of the leaves, by their names in the old layout. What has no row, but lies within a
            layer, is stacked along axis 0, as MaxText does with what is no weight.
        old_axis, new_axis: MaxText's param_scan_axis, or None where layers are not stacked.

    Raises:
        UserError: with every leaf that is not stacked as its layers are.
    """
    shapes = {name.replace(".", "/"): shape for name, shape in shapes.items()}
    known = paths(old, old_axis)
    beside = _beside(old, {p: s for p, s in shapes.items() if p not in known}, old_axis)
    ours = [*_present(old, shapes, old_axis), *_present(_rows(old, beside), shapes, old_axis)]
    layers = _of_each_layer(ours, shapes, old_axis)
    theirs = (row for row in map(_simple, [*new, *_rows(new, beside)]) if row.names() <= {*layers})
    was, problems = bind_rows(map(_simple, ours), layers, old_axis)
    becomes, others = bind_rows(theirs, layers, new_axis)
    assert not problems and not others, (problems, others)
    back = invert({_name(parameter): parameter.expr for parameter in was})
    leaves = [Leaf(_name(p), p.logical, joined(substitute(p.expr, back)), p.dtype) for p in becomes]
    left = shapes.keys() - {"/".join(p.path[1:]) for p in was}
    in_layers = {path for path in left if any(path in of for of in beside.values())}
    leaves += (_unmoved(path, shapes[path]) for path in left - in_layers)
    return Moved(leaves, [path.replace("/", ".") for path in in_layers])


def _name(parameter: Parameter) -> str:
    return parameter.name.removeprefix(ROOT)


def _unmoved(path: str, shape: Shape) -> Leaf:
    """A leaf that no layer has."""
    name = path.replace("/", ".")
    return Leaf(name, (None,) * len(shape), Tensor(name, shape))


def _simple(row: Row) -> Row:
    """The row over a tensor for each of its layers."""
    return replace(row, expr=Tensor(row.path.replace(_LAYERS, _LAYER)), experts=0)


def _present(rows: Iterable[Row], shapes: Mapping[str, Shape], axis: int | None) -> Iterator[Row]:
    """The rows whose leaves are there."""
    return (row for row in rows if paths([row], axis) <= shapes.keys())


def _of_each_layer(
    rows: Iterable[Row], shapes: Mapping[str, Shape], axis: int | None
) -> dict[str, Shape]:
    """The shape of each tensor of `_simple` rows, from the leaves that hold them.

    Raises:
        UserError: with every leaf that has another length where layers are stacked.
    """
    found: dict[str, Shape] = {}
    problems: list[str] = []
    for row in rows:
        lengths, name = stack_lengths([row], axis), row.path.replace(_LAYERS, _LAYER)
        for path, numbers in _places(row.layers, row.path, axis):
            shape, stacked = shapes[path], lengths[path]
            if {at: shape[at] for at in stacked if at < len(shape)} != stacked:
                problems.append(
                    f"{path.replace('/', '.')} of shape {shape} is not stacked as its layers are, "
                    "so it cannot be laid out anew; leave out the training state."
                )
                continue
            of_one = tuple(n for at, n in enumerate(shape) if at not in stacked)
            found |= {name.format(l=number): of_one for number in numbers}
    if problems:
        raise UserError(problems)
    return found


def _places(
    layers: Layers | None, path: str, axis: int | None
) -> Iterator[tuple[str, Sequence[int]]]:
    """The paths of a row, each with the layers that it holds."""
    if layers is None:
        yield path, [0]
        return
    for at, numbers in layers.unscanned if axis is None else layers.scanned:
        yield path.format(layers=at), flat(numbers)


class _Inside(NamedTuple):
    """Something without a row in a layer: the path of the layer with `{layers}`, that within it,
    and the number of its axes, without those of a stack."""

    layer: str
    path: str
    rank: int


def _beside(
    rows: Iterable[Row], shapes: Mapping[str, Shape], axis: int | None
) -> dict[_Inside, set[str]]:
    """What lies in layers without a row, with the paths that it has there."""
    found: dict[_Inside, set[str]] = {}
    for layer, kinds in _heads(rows).items():
        for layers in kinds:
            alike = Row(layer, (), Tensor(layer), stack=0, layers=layers)
            for at, stacked in stack_lengths([alike], axis).items():
                for path in (path for path in shapes if path.startswith(f"{at}/")):
                    rank = len(shapes[path]) - len(stacked)
                    inside = _Inside(layer, path.removeprefix(f"{at}/"), rank)
                    found.setdefault(inside, set()).add(path)
    return found


def _rows(rows: Iterable[Row], beside: Iterable[_Inside]) -> Iterator[Row]:
    """Rows for what lies in layers without one; it is not sharded."""
    heads = _heads(rows)
    for layer, path, rank in beside:
        for layers in heads.get(layer, ()):
            yield Row(f"{layer}/{path}", ("-",) * rank, Tensor(path), stack=0, layers=layers)


def _heads(rows: Iterable[Row]) -> dict[str, list[Layers]]:
    """Where layers are in the paths of rows, and which layers are there."""
    found: dict[str, list[Layers]] = {}
    for row in rows:
        if row.layers is not None:
            kinds = found.setdefault(row.path.partition(_LAYERS)[0] + _LAYERS, [])
            if row.layers not in kinds:
                kinds.append(row.layers)
    return found
