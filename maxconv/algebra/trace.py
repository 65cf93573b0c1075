"""Evaluating a box of an expression: what it reads, and the pure function of what was read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxconv.algebra.boxes import Box, clip, dims, full, slices, with_axis
from maxconv.algebra.expr import Apply, Combine, Concat, Expr, Fill, Tensor
from maxconv.algebra.ops import Fit, Op
from maxconv.algebra.rearrange import Pattern

_Fn = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Read:
    """A box of a tensor. It may reach past the tensor's end: there the reader gives zeros."""

    name: str
    box: Box


@dataclass(frozen=True)
class Trace:
    """`run(inputs)` gives the box, of `dims(box)`, from one array per entry of `reads`.

    Inputs are numpy or JAX arrays; `run` is pure and can be jitted.
    """

    reads: tuple[Read, ...]
    run: _Fn


def trace(expr: Expr, box: Box | None = None) -> Trace:
    """Pulls a box of a bound expression (default: all of it) back to the tensors it needs."""
    reads: list[Read] = []
    run = _exact(expr, box or full(expr.shape), reads)
    return Trace(tuple(reads), run)


def _exact(expr: Expr, box: Box, reads: list[Read]) -> _Fn:
    run, cover = _covering(expr, box, reads)
    if cover == box:
        return run
    trim = slices(box, cover)
    return lambda xs: run(xs)[trim]


def _covering(expr: Expr, box: Box, reads: list[Read]) -> tuple[_Fn, Box]:
    match expr:
        case Tensor(name):
            return _read(name, box, reads), box
        case Fill(_, value):
            return lambda _: np.full(dims(box), value, np.float32), box
        case Concat():
            return _concat(expr, box, reads), box
        case Combine():
            boxes = expr.pull(box)
            runs = [_exact(p, b, reads) for p, b in zip(expr.parts, boxes, strict=True)]
            return lambda xs: expr.run([run(xs) for run in runs]), box
        case Apply(Fit(), Tensor(name)):  # padding a tensor is reading past its end
            return _read(name, box, reads), box
        case Apply(op, x):
            bound = _bound(op)
            in_box, cover = bound.pull(box, x.shape)
            inner = _exact(x, in_box, reads)
            return lambda xs: bound.run(inner(xs), in_box, cover), cover


def _read(name: str, box: Box, reads: list[Read]) -> _Fn:
    reads.append(Read(name, box))
    i = len(reads) - 1
    return lambda xs: xs[i]


def _concat(expr: Concat, box: Box, reads: list[Read]) -> _Fn:
    axis = expr.axis
    lo, hi = box[axis]
    runs = []
    for part, start, stop in expr.placed():
        a, b = max(lo, start), min(hi, stop)
        if a < b:
            runs.append(_exact(part, with_axis(box, axis, (a - start, b - start)), reads))
    if len(runs) == 1:
        return runs[0]

    def run(xs: Sequence[Any]) -> Any:
        parts = [r(xs) for r in runs]
        return parts[0].__array_namespace__().concat(parts, axis=axis)

    return run


def _bound(op: Op | Pattern) -> Op:
    if isinstance(op, Pattern):
        raise TypeError(f"{op} is not bound; bind the expression first")
    return op


def evaluate(expr: Expr, arrays: Mapping[str, np.ndarray], box: Box | None = None) -> np.ndarray:
    """A box of an expression over whole arrays in memory: `trace`, spelt out."""
    t = trace(expr, box)
    return t.run([read_box(arrays[r.name], r.box) for r in t.reads])


def read_box(array: np.ndarray, box: Box) -> np.ndarray:
    """A box of an array, zeros where it reaches past the end."""
    inside = clip(box, array.shape)
    if inside == box:
        return array[slices(box)]
    out = np.zeros(dims(box), array.dtype)
    out[slices(inside, box)] = array[slices(inside)]
    return out
