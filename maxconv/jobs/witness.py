"""An independent check of the leaves, with numpy on tensors that are read in the simplest way.

It evaluates the expression of a leaf, chunk by chunk as stored, and compares bits. It does not use
the planner's cells and lanes, compiled programs, or the reader that coalesces and scatters boxes.
Local files are read with the safetensors library, others row by row.

A sample costs each process up to 512 MiB of reads. A full check reads the checkpoint and its source
once more, an equal part on each process, and takes about a second per GB.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import ml_dtypes
import numpy as np
from safetensors import safe_open

from maxconv.algebra import (
    Box,
    Combine,
    Concat,
    Expr,
    clip,
    dims,
    full,
    nodes,
    slices,
    trace,
    volume,
    with_axis,
)
from maxconv.algebra.boxes import intersect
from maxconv.planning.plan import LeafPlan
from maxconv.sources import Source, TensorInfo
from maxconv.sources.orbax import Item, reason

SAMPLE_BYTES = 512 << 20  # stored chunks and tensors that a process reads for a sample
BOX_BYTES = 256 << 10  # size of a box in a sample
BOXES = 4  # boxes per chunk in a sample: one in a corner, the others at random
WORK_BYTES = 32 << 20  # bytes of a leaf evaluated at once; numpy holds a few float32 copies


@dataclass
class Testimony:
    """The work of this process: bytes of leaves compared, and bytes of tensors read for that."""

    compared: int = 0
    read: int = 0


def witness(
    item: Item,
    leaves: Sequence[LeafPlan],
    source: Source,
    mode: str,
    say: Callable[[Testimony], object] = lambda testimony: None,
) -> tuple[Testimony, dict[str, str]]:
    """Compares this process' share of a checkpoint with what numpy computes from the source.

    Args:
        item: the checkpoint.
        leaves: those of the plan that are in the checkpoint with the planned shape and dtype.
        source: of the conversion.
        mode: "full" compares every element of every leaf, divided among all processes. "sample"
            compares `BOXES` boxes in one chunk of each leaf, within 512 MiB of reads; one leaf of
            each kind comes first. The choice is deterministic.
        say: called after every box.

    Returns:
        What was compared, and a sentence for each leaf that differs.
    """
    seen, problems = Testimony(), dict[str, str]()

    def read(info: TensorInfo, box: Box) -> np.ndarray:
        seen.read += volume(box) * info.dtype.itemsize
        return plainly_read(source, info, box)

    for leaf, chunk, boxes in _full(item, leaves) if mode == "full" else _sample(item, leaves):
        if leaf.name in problems:
            continue
        try:
            stored = item.open(leaf.name, [chunk]).result()[slices(chunk)].read().result()
        except (ValueError, OSError) as error:
            problems[leaf.name] = f"{leaf.name} cannot be read: {reason(error)}."
            continue
        for box in boxes:
            made = evaluated(leaf.leaf.expr, box, source.tensors, read)
            with np.errstate(all="ignore"):
                made = made.astype(leaf.dtype)
            part, sums = stored[slices(box, chunk)], has_sums(leaf.leaf.expr)
            if found := difference(leaf.name, box, made, part, sums):
                problems[leaf.name] = found
                break
            seen.compared += volume(box) * leaf.dtype.itemsize
            say(seen)
    return seen, problems


Share = Iterator[tuple[LeafPlan, Box, Sequence[Box]]]
"""Chunks of leaves, each with the boxes in it to compare."""


def _full(item: Item, leaves: Sequence[LeafPlan]) -> Share:
    number = 0
    for leaf in leaves:
        for chunk in _chunks(item, leaf):
            if number % jax.process_count() == jax.process_index():
                yield leaf, chunk, [*pieces(leaf.leaf.expr, chunk, leaf.dtype.itemsize)]
            number += 1


def _sample(item: Item, leaves: Sequence[LeafPlan]) -> Share:
    left = SAMPLE_BYTES
    for leaf in _one_of_each_kind_first(leaves)[jax.process_index() :: jax.process_count()]:
        random = np.random.default_rng(zlib.crc32(leaf.name.encode()))
        chunks = [*_chunks(item, leaf)]
        chunk = chunks[random.integers(len(chunks))]
        boxes = [box_in(chunk, leaf.dtype.itemsize, random, i == 0) for i in range(BOXES)]
        cost = volume(chunk) * leaf.dtype.itemsize
        cost += sum(_cost(leaf.leaf.expr, box) for box in set(boxes))
        if cost <= left:
            left -= cost
            yield leaf, chunk, [*dict.fromkeys(boxes)]


def _one_of_each_kind_first(leaves: Sequence[LeafPlan]) -> list[LeafPlan]:
    ranks: dict[object, int] = {}
    ranked = []
    for leaf in sorted(leaves, key=lambda leaf: leaf.nbytes):
        kind = frozenset(step.recipe for step in leaf.steps)
        ranks[kind] = ranks.get(kind, -1) + 1
        ranked.append((ranks[kind], leaf))
    return [leaf for _, leaf in sorted(ranked, key=lambda pair: pair[0])]


def _chunks(item: Item, leaf: LeafPlan) -> Iterator[Box]:
    """The chunks of a leaf as stored, each read and decoded as a unit."""
    extents = item.arrays[leaf.name].inner or leaf.shape
    counts = [-(-n // max(extent, 1)) for n, extent in zip(leaf.shape, extents, strict=True)]
    for place in np.ndindex(*counts):
        grid = zip(place, extents, leaf.shape, strict=True)
        yield tuple((i * extent, min((i + 1) * extent, n)) for i, extent, n in grid)


def box_in(chunk: Box, itemsize: int, random: np.random.Generator, corner: bool) -> Box:
    """A small box: as much of the last axes as fits, at a random or corner position."""
    room, box = BOX_BYTES // itemsize, []
    for lo, hi in reversed(chunk):
        n = max(1, min(hi - lo, room))
        room //= n
        at = hi - n if corner else int(random.integers(lo, hi - n + 1))
        box.append((at, at + n))
    return tuple(reversed(box))


def pieces(expr: Expr, box: Box, itemsize: int) -> Iterator[Box]:
    """Splits a box into pieces small enough to evaluate: between the parts of a stack, then along
    the axis that keeps rows of tensors whole."""
    if isinstance(expr, Concat):
        places = [(start, stop) for _, start, stop in expr.placed()]
        parts = (with_axis(full(expr.shape), expr.axis, place) for place in places)
        for common in filter(None, (intersect(box, part) for part in parts)):
            yield from _cut(expr, common, itemsize)
    else:
        yield from _cut(expr, box, itemsize)


def _cut(expr: Expr, box: Box, itemsize: int) -> Iterator[Box]:
    if max(volume(box) * itemsize, _cost(expr, box)) <= WORK_BYTES or volume(box) <= 1:
        yield box
        return
    axes = [axis for axis, (lo, hi) in enumerate(box) if hi - lo > 1]
    halves = [[*_halves(box, axis)] for axis in axes]
    for half in min(halves, key=lambda two: sum(_runs(expr, half) for half in two)):
        yield from _cut(expr, half, itemsize)


def _halves(box: Box, axis: int) -> Iterator[Box]:
    lo, hi = box[axis]
    middle = (lo + hi) // 2
    yield with_axis(box, axis, (lo, middle))
    yield with_axis(box, axis, (middle, hi))


def _cost(expr: Expr, box: Box) -> int:
    """Bytes of the tensors that a box needs, as float32."""
    return 4 * sum(volume(read.box) for read in trace(expr, box).reads)


def _runs(expr: Expr, box: Box) -> int:
    """Number of rows of tensors that a box needs."""
    return sum(math.prod(dims(read.box)[:-1]) for read in trace(expr, box).reads)


def evaluated(
    expr: Expr,
    box: Box,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[TensorInfo, Box], np.ndarray],
) -> np.ndarray:
    """A box of an expression, computed by numpy from boxes of tensors that `read` gives."""
    traced = trace(expr, box)
    arrays = []
    for wanted in traced.reads:
        info = tensors[wanted.name]
        array, inside = np.zeros(dims(wanted.box), info.dtype), clip(wanted.box, info.shape)
        if volume(inside):
            array[slices(inside, wanted.box)] = read(info, inside)
        arrays.append(array)
    with np.errstate(all="ignore"):  # overflow and NaNs come from the source
        return traced.run(arrays)


def plainly_read(source: Source, info: TensorInfo, box: Box) -> np.ndarray:
    """A box of a tensor, read with the safetensors library if possible.

    That reads only local files, and no float8 into numpy.
    """
    path = source.path(info)
    if path is not None and not info.dtype.name.startswith("float8"):
        with safe_open(path, framework="np") as file:
            tensor = file.get_slice(info.name)
            found = tensor[slices(box)] if box else file.get_tensor(info.name)
        return found.astype(info.dtype, copy=False)
    return source.plain(info, box)


def difference(
    name: str, box: Box, made: np.ndarray, stored: np.ndarray, sums: bool = False
) -> str | None:
    """A sentence about the first element of a box in which the bits differ; None if none does.

    `sums`: it was computed with a matrix product, whose rounding may differ.
    """
    made, stored = np.ascontiguousarray(made), np.ascontiguousarray(stored)
    unsigned = f"u{made.dtype.itemsize}"
    unequal = made.view(unsigned) != stored.view(unsigned)
    if sums:
        unequal &= ~_is_near(made, stored)
    if not unequal.any():
        return None
    index = np.unravel_index(np.flatnonzero(unequal)[0], made.shape)
    place = ", ".join(str(lo + int(i)) for (lo, _), i in zip(box, index, strict=True))
    should, got = (f"{x[index]} (0x{int(x.view(unsigned)[index]):x})" for x in (made, stored))
    return f"{name}[{place}] is {got}, but should be {should} according to numpy."


def has_sums(expr: Expr) -> bool:
    """Whether it has a matrix product, whose rounding depends on the order of summation."""
    return any(isinstance(node, Combine) and node.op == "matmul" for node in nodes(expr))


def _is_near(made: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Where values agree up to rounding: one step of the dtype, plus cancellation in sums."""
    a, b = (x.astype(np.float32) for x in (made, stored))
    step = float(ml_dtypes.finfo(made.dtype).eps)
    return np.isclose(a, b, rtol=step, atol=1e-5 * float(np.abs(a).max(initial=0)), equal_nan=True)
