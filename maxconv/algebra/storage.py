"""How a box of a C-order tensor lies in storage: its runs of bytes, how to cut and join boxes."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from operator import itemgetter

import numpy as np

from maxconv.algebra.boxes import Box, dims


def runs(shape: Sequence[int], box: Box, itemsize: int) -> tuple[np.ndarray, int]:
    """The contiguous runs of bytes that make up a box of a C-order tensor.

    Returns:
        The offset of each run from the tensor's start, ascending, int64[runs]; and the bytes in
        each of them, which is the same for all.
    """
    extents = dims(box)
    if 0 in extents:
        return np.empty(0, np.int64), 0
    # Up to and including the last axis that the box does not span, a step leaves the run.
    split = max((axis for axis, n in enumerate(shape) if extents[axis] < n), default=0)
    strides = [math.prod(shape[axis + 1 :]) * itemsize for axis in range(len(shape))]
    first = sum(start * stride for (start, _), stride in zip(box, strides, strict=True))
    steps = (np.arange(n) * stride for n, stride in zip(extents[:split], strides, strict=False))
    offsets = reduce(np.add.outer, steps, np.array(first, np.int64)).reshape(-1)
    return offsets, math.prod(extents[split:]) * itemsize


def coalesce(boxes: Iterable[Box]) -> list[Box]:
    """Disjoint boxes joined along the axes where they meet face to face, in the order of storage.

    A grid of boxes, such as the shards of an array, becomes one box.
    """
    boxes = list(boxes)
    for axis in reversed(range(len(boxes[0]) if boxes else 0)):
        joined: dict[tuple[Box, int], Box] = {}  # by the other axes, and the end along this one
        for box in sorted(boxes, key=itemgetter(axis)):
            others = box[:axis] + box[axis + 1 :]
            start, stop = box[axis]
            before = joined.pop((others, start), None)
            start = before[axis][0] if before else start
            joined[others, stop] = (*box[:axis], (start, stop), *box[axis + 1 :])
        boxes = list(joined.values())
    return sorted(boxes)


def blocks(box: Box, itemsize: int, limit: int) -> Iterator[Box]:
    """Splits a box, along its leading axes, into boxes of at most `limit` bytes (or 1 item)."""
    extents = dims(box)
    axis = next((axis for axis, n in enumerate(extents) if n > 1), None)
    if axis is None or math.prod(extents) * itemsize <= limit:
        yield box
        return
    start, stop = box[axis]
    rows = max(1, limit // (math.prod(extents[axis + 1 :]) * itemsize))
    for row in range(start, stop, rows):
        part = (*box[:axis], (row, min(row + rows, stop)), *box[axis + 1 :])
        yield from blocks(part, itemsize, limit)
