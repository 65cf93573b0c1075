"""From expressions and shardings to reads: all that will happen, checked before a byte moves.

The unit of work is a *cell*: the part of a leaf that one evaluation makes, such as one layer of a
scanned kernel. Cells that differ only in the names of their tensors share a `Recipe`, and a recipe
is compiled once. What a cell reads is sharded as its output is, pulled back through the expression,
so that no device needs another's bytes and the compiled cell has no collectives.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxconv.algebra import (
    AlgebraError,
    Apply,
    Box,
    Concat,
    Expr,
    Read,
    Shape,
    Tensor,
    clip,
    dims,
    full,
    invert,
    tensors,
    trace,
    unused,
    volume,
    with_axis,
)
from maxconv.errors import UserError
from maxconv.families import Leaf, bind_rows
from maxconv.model import Model
from maxconv.sharding import partition_spec
from maxconv.sources import Source, TensorInfo

Offset = tuple[int, ...]


@dataclass(frozen=True)
class CellRead:
    """What a cell reads of one of its tensors: a box (see algebra.Read) with this sharding."""

    box: Box
    tensor: Shape
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def shape(self) -> Shape:
        return dims(self.box)

    @property
    def shard_nbytes(self) -> int:
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    def nbytes(self, process: int) -> int:
        """Bytes a process reads; what lies past the tensor's end is not read."""
        boxes = {
            box
            for device, box in device_boxes(self.sharding, self.box).items()
            if device.process_index == process
        }
        return sum(volume(clip(box, self.tensor)) for box in boxes) * self.dtype.itemsize


@dataclass(frozen=True)
class Recipe:
    """How a cell is computed; compiled once for all cells that share it.

    Attributes:
        cell: expression over tensors named "0", "1", ...
        reads: what it reads, in the order of `algebra.trace(cell).reads`.
        inputs: for each read, which of the cell's tensors it is.
        shape, dtype, sharding: of the leaf that the cell is written into.
    """

    cell: Expr
    reads: tuple[CellRead, ...]
    inputs: tuple[int, ...]
    shape: Shape
    dtype: np.dtype
    sharding: NamedSharding

    @property
    def is_whole(self) -> bool:
        """The cell is the leaf: there is nothing to write it into."""
        return self.cell.shape == self.shape

    def nbytes(self, process: int) -> int:
        """Bytes that a process reads for one cell."""
        return sum(read.nbytes(process) for read in self.reads)

    @cached_property
    def buffer_nbytes(self) -> int:
        """Host bytes that this process' reads of one cell take."""
        return sum(
            read.shard_nbytes * len(set(local_boxes(read.sharding, read.box).values()))
            for read in self.reads
        )


@dataclass(frozen=True)
class Step:
    """One cell: where in the leaf it goes, and the names of its tensors."""

    offset: Offset
    names: tuple[str, ...]


@dataclass(frozen=True)
class LeafPlan:
    """A leaf: what it is, where it lives, how it comes about.

    `replicated` says, in words, which axes could not be sharded as the rules have it.
    """

    leaf: Leaf
    dtype: np.dtype
    sharding: NamedSharding
    steps: tuple[tuple[Recipe, Step], ...]
    replicated: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.leaf.name

    @property
    def shape(self) -> Shape:
        return self.leaf.shape

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shard_nbytes(self) -> int:
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    @property
    def local_nbytes(self) -> int:
        """Bytes of this process' shards on all its devices."""
        return self.shard_nbytes * len(self.sharding.addressable_devices)


@dataclass(frozen=True)
class Plan:
    """A whole conversion. `notices` are sentences the user should see."""

    model: Model
    mesh: Mesh
    leaves: tuple[LeafPlan, ...]
    notices: tuple[str, ...]

    @cached_property
    def recipes(self) -> dict[Recipe, int]:
        """Every distinct recipe, with the number of its cells."""
        counts: dict[Recipe, int] = {}
        for leaf in self.leaves:
            for recipe, _ in leaf.steps:
                counts[recipe] = counts.get(recipe, 0) + 1
        return counts

    @property
    def output_nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    def read_nbytes(self, process: int) -> int:
        """Bytes of tensors that a process reads."""
        return sum(recipe.nbytes(process) * n for recipe, n in self.recipes.items())

    @cached_property
    def needed_nbytes(self) -> int:
        """Bytes of tensors that the leaves are made of, each counted once."""
        sizes: dict[tuple[str, Box], int] = {}
        for leaf in self.leaves:
            for recipe, step in leaf.steps:
                for read, i in zip(recipe.reads, recipe.inputs, strict=True):
                    box = clip(read.box, read.tensor)
                    sizes[step.names[i], box] = volume(box) * read.dtype.itemsize
        return sum(sizes.values())

    @property
    def processes(self) -> list[int]:
        return sorted({d.process_index for d in self.mesh.devices.flat})


def make_plan(
    source: Source,
    model: Model,
    mesh: Mesh,
    rules: Sequence[Any],
    scan_axis: int | None = 1,
    save_dtype: np.dtype | str = "bfloat16",
) -> Plan:
    """Plans a conversion.

    Args:
        source: the checkpoint's tensors.
        model: what they are.
        mesh: MaxText's training mesh.
        rules: MaxText's logical axis rules.
        scan_axis: param_scan_axis, or None for unscanned layers.
        save_dtype: of the leaves.

    Raises:
        UserError: everything that does not fit, at once.
    """
    shapes = {name: info.shape for name, info in source.tensors.items()}
    rows = model.family.rows(model.dims)
    leaves, problems = bind_rows(rows, shapes, model.dims.layers, scan_axis)
    expressions = {leaf.name: leaf.expr for leaf in leaves}
    if not problems:
        try:
            invert(expressions)  # only a table whose slices tile can be turned round
        except AlgebraError as error:
            problems += str(error).splitlines()
        left = [n for n in unused(expressions, list(shapes)) if not model.is_dropped(n)]
        problems += [f"{model.family.architectures[0]} has no use for tensor {n}" for n in left]
    if problems:
        raise UserError([f"{source.root}: {p}." for p in problems])
    planner = _Planner(source.tensors, mesh, rules, np.dtype(save_dtype))
    planned = tuple(planner.leaf(leaf) for leaf in leaves)
    notices = [*model.notices]
    for words in dict.fromkeys(w for leaf in planned for w in leaf.replicated):
        notices.append(f"{words}: that axis is replicated")
    return Plan(model, mesh, planned, tuple(notices))


@dataclass(frozen=True)
class _Planner:
    tensors: Mapping[str, TensorInfo]
    mesh: Mesh
    rules: Sequence[Any]
    dtype: np.dtype

    def leaf(self, leaf: Leaf) -> LeafPlan:
        spec, dropped = partition_spec(leaf.logical, leaf.shape, dict(self.mesh.shape), self.rules)
        sharding = NamedSharding(self.mesh, spec)
        steps = []
        for offset, expr in _cells(leaf.expr, (0,) * len(leaf.shape)):
            cell, names = _anonymous(expr)
            dtypes = tuple(self.tensors[n].dtype for n in names)
            recipe = _recipe(cell, dtypes, leaf.shape, self.dtype, sharding)
            steps.append((recipe, Step(offset, names)))
        return LeafPlan(leaf, self.dtype, sharding, tuple(steps), dropped)


def _cells(expr: Expr, offset: Offset) -> Iterator[tuple[Offset, Expr]]:
    """The parts of a leaf that are written one by one, and where."""
    if not isinstance(expr, Concat):
        yield offset, expr
        return
    axis = expr.axis
    for part, start, _ in expr.placed():
        yield from _cells(part, (*offset[:axis], offset[axis] + start, *offset[axis + 1 :]))


def _anonymous(expr: Expr) -> tuple[Expr, tuple[str, ...]]:
    """An expression over "0", "1", ... and the names that these stand for."""
    names = list(dict.fromkeys(t.name for t in tensors(expr)))

    def rename(node: Expr) -> Expr:
        match node:
            case Tensor(name, shape):
                return Tensor(str(names.index(name)), shape)
            case Apply(op, x):
                return Apply(op, rename(x))
            case Concat(axis, parts):
                return Concat(axis, tuple(rename(part) for part in parts))
            case _:
                return node

    return rename(expr), tuple(names)


@cache
def _recipe(
    cell: Expr, dtypes: tuple[np.dtype, ...], shape: Shape, dtype: np.dtype, to: NamedSharding
) -> Recipe:
    known = {t.name: t.shape for t in tensors(cell)}
    reads, inputs = [], []
    for read, spec in _pulled_back(cell, shape, to):
        i = int(read.name)
        sharding = NamedSharding(to.mesh, spec)
        reads.append(CellRead(read.box, known[read.name], dtypes[i], sharding))
        inputs.append(i)
    return Recipe(cell, tuple(reads), tuple(inputs), shape, dtype, to)


def _pulled_back(cell: Expr, shape: Shape, to: NamedSharding) -> list[tuple[Read, PartitionSpec]]:
    """What a cell reads, each read sharded so that a device has what its part of the cell needs.

    An axis of the leaf passes its mesh axes on to the axis of the tensor that it cuts into equal,
    ordered pieces. Where there is none (it is cut inside a permuted atom, or another axis took its
    place) the read is replicated over those mesh axes.
    """
    whole = trace(cell).reads
    specs: list[list[Any]] = [[None] * len(read.box) for read in whole]
    spec = [*to.spec, *[None] * (len(shape) - len(to.spec))]
    for axis, names in enumerate(spec):
        mesh_axes = names if isinstance(names, tuple) else (names,)
        shards = 1 if names is None else math.prod(to.mesh.shape[name] for name in mesh_axes)
        if shards == 1 or cell.shape[axis] != shape[axis]:
            continue
        n = shape[axis] // shards
        pieces = [
            trace(cell, with_axis(full(cell.shape), axis, (s * n, (s + 1) * n))).reads
            for s in range(shards)
        ]
        for i, read in enumerate(whole):
            cut = _axis_cut_alike(read, i, pieces)
            if cut is not None and specs[i][cut] is None:
                specs[i][cut] = names
    return [(read, PartitionSpec(*s)) for read, s in zip(whole, specs, strict=True)]


def _axis_cut_alike(read: Read, i: int, pieces: Sequence[Sequence[Read]]) -> int | None:
    """The one axis of a read that the pieces cut evenly and in order, if there is one."""
    if any(len(reads) <= i or reads[i].name != read.name for reads in pieces):
        return None
    cut = {
        axis
        for reads in pieces
        for axis, interval in enumerate(reads[i].box)
        if interval != read.box[axis]
    }
    if len(cut) != 1:
        return None
    (axis,) = cut
    lo, hi = read.box[axis]
    n, left = divmod(hi - lo, len(pieces))
    even = [(lo + s * n, lo + (s + 1) * n) for s in range(len(pieces))]
    return axis if not left and [reads[i].box[axis] for reads in pieces] == even else None


@cache
def device_boxes(sharding: NamedSharding, of: Box) -> dict[jax.Device, Box]:
    """The box that each device holds of an array whose own box is `of`."""
    return {
        device: tuple(
            (lo + s.indices(hi - lo)[0], lo + s.indices(hi - lo)[1])
            for s, (lo, hi) in zip(index, of, strict=True)
        )
        for device, index in sharding.devices_indices_map(dims(of)).items()
    }


@cache
def local_boxes(sharding: NamedSharding, of: Box) -> dict[jax.Device, Box]:
    """`device_boxes` for the devices of this process."""
    mine = sharding.addressable_devices
    return {device: box for device, box in device_boxes(sharding, of).items() if device in mine}
