"""The algebra of checkpoints: one expression per leaf. Pure: no devices, no files.

`trace` tells what a box of a leaf reads and how it is computed; `invert` gives the way back.
"""

from maxconv.algebra.boxes import Box, Interval, Shape, clip, dims, full, slices, volume, with_axis
from maxconv.algebra.decode import Cast, Exp2, Repeat, Unpack
from maxconv.algebra.expr import (
    Apply,
    Combine,
    Concat,
    Expr,
    Fill,
    Stacked,
    Tensor,
    apply,
    bind,
    free_indices,
    hf,
    map_tensors,
    nodes,
    renamed,
    stack,
    substitute,
    tensors,
)
from maxconv.algebra.invert import check_covered, invert, unused
from maxconv.algebra.ops import Affine, Fit, Op, Slice, fit, scale, shift
from maxconv.algebra.rearrange import AlgebraError, Pattern, Rearrange, rearrange
from maxconv.algebra.trace import Read, Trace, evaluate, read_box, trace

__all__ = [
    "Affine",
    "AlgebraError",
    "Apply",
    "Box",
    "Cast",
    "Combine",
    "Concat",
    "Exp2",
    "Expr",
    "Fill",
    "Fit",
    "Interval",
    "Op",
    "Pattern",
    "Read",
    "Rearrange",
    "Repeat",
    "Shape",
    "Slice",
    "Stacked",
    "Tensor",
    "Trace",
    "Unpack",
    "apply",
    "bind",
    "check_covered",
    "clip",
    "dims",
    "evaluate",
    "fit",
    "free_indices",
    "full",
    "hf",
    "invert",
    "map_tensors",
    "nodes",
    "read_box",
    "rearrange",
    "renamed",
    "scale",
    "shift",
    "slices",
    "stack",
    "substitute",
    "tensors",
    "trace",
    "unused",
    "volume",
    "with_axis",
]
