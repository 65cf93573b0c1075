"""A checkpoint of Hugging Face as it would be under other names, or without its packing."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from maxconv.algebra import Concat, Expr, Rearrange, Tensor, apply, nodes, rearrange, tensors
from maxconv.algebra.expr import Apply
from maxconv.errors import UserError
from maxconv.families import Family
from maxconv.models.canonical_names import fused_experts
from maxconv.models.codecs import decoded, unquantised
from maxconv.models.stored_names import renamer
from maxconv.sources import Source, TensorInfo


class View(Source):
    """Other tensors that a checkpoint could have; they are described, and cannot be read.

    Attributes:
        weights: each tensor, over those that are stored.
        codecs: notices about what is packed in the checkpoint.
    """

    def __init__(self, of: Source, weights: Mapping[str, Expr]):
        super().__init__()
        self.root, self.revision, self.notices = of.root, of.revision, of.notices
        self.config, self.contradictory = of.config, of.contradictory
        self.weights = weights
        self.codecs: tuple[str, ...] = ()
        self.tensors = {name: _info(of, name, weight) for name, weight in weights.items()}

    def read(self, info: TensorInfo, parts: Sequence[Any]) -> None:
        raise OSError(f"{self.root} is used for its names; {info.name} is not read")

    def close(self) -> None:
        pass


def as_stored(source: Source) -> View:
    """A checkpoint as it is."""
    return View(source, {name: Tensor(name, info.shape) for name, info in source.tensors.items()})


def unpacked(source: Source) -> View:
    """A checkpoint as it would be without quantisation."""
    stored = {name: Tensor(name, info.shape) for name, info in source.tensors.items()}
    dtypes = {name: info.dtype for name, info in source.tensors.items()}
    weights, codecs = decoded(stored, source.config, False, dtypes)
    view = View(source, weights)
    view.config = unquantised(source.config)
    view.codecs = codecs
    return view


def in_memory(view: View, source: Source, family: Family) -> View:
    """A checkpoint with the names that transformers 5 has in memory, and its shapes of experts.

    Raises:
        UserError: they are not known.
    """
    if family.in_memory is None:
        raise UserError(
            "--names=transformers: the names that transformers has in memory are not known for "
            f"{family.architectures[0]}; remove it."
        )
    rename = renamer(family.in_memory)
    weights = {rename(name)[0]: weight for name, weight in view.weights.items()}
    weights = fused_experts(weights, (*family.split_experts, *family.fuse_experts))
    for fused, down in family.transposed_experts:
        for name in [name for name in weights if name.endswith(fused)]:
            other = name.removesuffix(fused) + down
            into, out = weights[name].shape, weights[other].shape
            if into[1:] == (out[2], 2 * out[1]):
                for one in (name, other):
                    weights[one] = apply(rearrange("x i o -> x o i"), weights[one])
    renamed = View(source, weights)
    renamed.config, renamed.codecs = view.config, view.codecs
    return renamed


def _info(source: Source, name: str, weight: Expr) -> TensorInfo:
    """What a tensor would be: of the stored dtype if it is only moved, else bfloat16."""
    if isinstance(weight, Tensor):
        info = source.tensors[weight.name]
        return TensorInfo(name, info.dtype, info.shape, info.chunk)
    dtypes = {source.tensors[tensor.name].dtype for tensor in tensors(weight)}
    is_moved = len(dtypes) == 1 and all(map(_moves, nodes(weight)))
    dtype = dtypes.pop() if is_moved else np.dtype("bfloat16")
    return TensorInfo(name, dtype, weight.shape)


def _moves(node: Expr) -> bool:
    return isinstance(node, Tensor | Concat) or (
        isinstance(node, Apply) and isinstance(node.op, Rearrange)
    )
