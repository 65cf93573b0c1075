"""A witness that shares nothing with what makes the leaves: numpy, over plainly read bytes.

It evaluates the expression of a leaf chunk by chunk as it is stored, and compares bits. Neither the
planner's cells and lanes, nor compiled programs, nor the reader that groups and scatters boxes are
part of that. Local files are read by the safetensors library, others a row at a time.

A sample costs each process up to 512 MiB of reads. A full check reads the checkpoint and its source
once more, of which each process has an equal part, and takes about a second per GB of them.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
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

SAMPLE_BYTES = 512 << 20  # of stored chunks and of tensors that a process reads for a sample
BOX_BYTES = 256 << 10  # of a box in a sample
BOXES = 4  # in a chunk of a sample: one in a corner, the others anywhere
WORK_BYTES = 32 << 20  # of a leaf that are evaluated at once: numpy holds a few float32 of them


@dataclass
class Testimony:
    """What this process has seen: bytes of leaves compared, bytes of tensors read for it."""

    compared: int = 0
    read: int = 0


def witness(
    item: Item,
    leaves: Sequence[LeafPlan],
    source: Source,
    mode: str,
    say: Callable[[Testimony], object] = lambda testimony: None,
) -> tuple[Testimony, dict[str, str]]:
    """Compares this process' share of a checkpoint with what numpy makes of the source.

    Args:
        item: the checkpoint.
        leaves: of the plan, that are in the checkpoint as planned.
        source: of the conversion.
        mode: "full" compares every element of every leaf; all processes together do. "sample" has
            `BOXES` boxes of one chunk of each leaf, as many as 512 MiB of reads allow; leaves that
            are made alike come after one of their kind. What is chosen is the same every time.
        say: called after every box.

    Returns:
        What was compared, and a sentence for each leaf of which something differs.
    """
    seen, problems = Testimony(), dict[str, str]()
    for leaf, chunk, boxes in _full(item, leaves) if mode == "full" else _sample(item, leaves):
        if leaf.name in problems:
            continue
        try:
            stored = item.open(leaf.name, [chunk]).result()[slices(chunk)].read().result()
        except (ValueError, OSError) as error:
            problems[leaf.name] = f"{leaf.name} cannot be read: {reason(error)}."
            continue
        for box in boxes:
            made = _evaluated(leaf, box, source, seen)
            if found := _difference(leaf, box, made, stored[slices(box, chunk)]):
                problems[leaf.name] = found
                break
            seen.compared += volume(box) * leaf.dtype.itemsize
            say(seen)
    return seen, problems


Share = Iterator[tuple[LeafPlan, Box, Sequence[Box]]]
"""Chunks of leaves, each with the boxes in it to look at."""


def _full(item: Item, leaves: Sequence[LeafPlan]) -> Share:
    number = 0
    for leaf in leaves:
        for chunk in _chunks(item, leaf):
            if number % jax.process_count() == jax.process_index():
                yield leaf, chunk, [*_pieces(leaf.leaf.expr, chunk, leaf.dtype.itemsize)]
            number += 1


def _sample(item: Item, leaves: Sequence[LeafPlan]) -> Share:
    left = SAMPLE_BYTES
    for leaf in _one_of_each_kind_first(leaves)[jax.process_index() :: jax.process_count()]:
        random = np.random.default_rng(zlib.crc32(leaf.name.encode()))
        chunks = [*_chunks(item, leaf)]
        chunk = chunks[random.integers(len(chunks))]
        boxes = [_box_in(chunk, leaf.dtype.itemsize, random, i == 0) for i in range(BOXES)]
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
    """The leaf as it is stored: what is read and decoded at once."""
    extents = item.arrays[leaf.name].inner or leaf.shape
    counts = [-(-n // max(extent, 1)) for n, extent in zip(leaf.shape, extents, strict=True)]
    for place in np.ndindex(*counts):
        grid = zip(place, extents, leaf.shape, strict=True)
        yield tuple((i * extent, min((i + 1) * extent, n)) for i, extent, n in grid)


def _box_in(chunk: Box, itemsize: int, random: np.random.Generator, corner: bool) -> Box:
    """A small box: as much of the last axes as there is room for, somewhere on the others."""
    room, box = BOX_BYTES // itemsize, []
    for lo, hi in reversed(chunk):
        n = max(1, min(hi - lo, room))
        room //= n
        at = hi - n if corner else int(random.integers(lo, hi - n + 1))
        box.append((at, at + n))
    return tuple(reversed(box))


def _pieces(expr: Expr, box: Box, itemsize: int) -> Iterator[Box]:
    """A box cut into pieces that can be evaluated at once: between the parts of a stack, then along
    the axis by which rows of tensors stay whole."""
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
    """Bytes that the tensors' boxes take once they are float32."""
    return 4 * sum(volume(read.box) for read in trace(expr, box).reads)


def _runs(expr: Expr, box: Box) -> int:
    """Rows of tensors that a box is made of."""
    return sum(math.prod(dims(read.box)[:-1]) for read in trace(expr, box).reads)


def _evaluated(leaf: LeafPlan, box: Box, source: Source, seen: Testimony) -> np.ndarray:
    traced = trace(leaf.leaf.expr, box)
    arrays = []
    for read in traced.reads:
        info = source.tensors[read.name]
        array, inside = np.zeros(dims(read.box), info.dtype), clip(read.box, info.shape)
        if volume(inside):
            array[slices(inside, read.box)] = plainly_read(source, info, inside)
        arrays.append(array)
        seen.read += volume(inside) * info.dtype.itemsize
    with np.errstate(all="ignore"):  # what overflows or is no number is so in the source
        return np.ascontiguousarray(traced.run(arrays).astype(leaf.dtype))


def plainly_read(source: Source, info: TensorInfo, box: Box) -> np.ndarray:
    """A box of a tensor, by the safetensors library where that can read it.

    It gives numpy no float8; and it reads files.
    """
    path = source.path(info)
    if path is not None and not info.dtype.name.startswith("float8"):
        with safe_open(path, framework="np") as file:
            tensor = file.get_slice(info.name)
            found = tensor[slices(box)] if box else file.get_tensor(info.name)
        return found.astype(info.dtype, copy=False)
    return source.plain(info, box)


def _difference(leaf: LeafPlan, box: Box, made: np.ndarray, stored: np.ndarray) -> str | None:
    stored = np.ascontiguousarray(stored)
    unsigned = f"u{leaf.dtype.itemsize}"
    unequal = made.view(unsigned) != stored.view(unsigned)
    if _has_sums(leaf.leaf.expr):
        unequal &= ~_is_near(made, stored)
    if not unequal.any():
        return None
    index = np.unravel_index(np.flatnonzero(unequal)[0], made.shape)
    place = ", ".join(str(lo + int(i)) for (lo, _), i in zip(box, index, strict=True))
    should, got = (f"{x[index]} (0x{int(x.view(unsigned)[index]):x})" for x in (made, stored))
    return f"{leaf.name}[{place}] is {got}, numpy makes it {should} from the source."


def _has_sums(expr: Expr) -> bool:
    """Whether it has a product of matrices, whose sums libraries add up in orders of their own."""
    return any(isinstance(node, Combine) and node.op == "matmul" for node in nodes(expr))


def _is_near(made: np.ndarray, stored: np.ndarray) -> np.ndarray:
    """Where two sums of the same terms may be: one step of the dtype apart, and what cancels."""
    a, b = (x.astype(np.float32) for x in (made, stored))
    step = float(ml_dtypes.finfo(made.dtype).eps)
    return np.isclose(a, b, rtol=step, atol=1e-5 * float(np.abs(a).max(initial=0)), equal_nan=True)
