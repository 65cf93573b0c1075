"""The embedding table and the head: one tensor, or two.

A checkpoint says so by tie_word_embeddings, and by what it holds. Where both disagree the tensors
are right: transformers 5 keeps a head that differs from the table, whatever the entry says.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxconv.algebra import Expr, Tensor, tensors
from maxconv.errors import UserError
from maxconv.families import Dims, Family
from maxconv.models.architecture import family_of, is_base
from maxconv.models.canonical_names import logical_tensors
from maxconv.models.lora import adapted_head, is_part
from maxconv.models.stored_names import EMBEDDING, HEAD
from maxconv.sources import Source, TensorInfo

TIE = "tie_word_embeddings"
_BLOCK = 16 << 20  # bytes of a table that are compared at once


@dataclass(frozen=True)
class Head:
    """Whether logits come from the embedding table, the tensors then, and what to say of it."""

    tied: bool
    tensors: Mapping[str, Expr]
    notices: tuple[str, ...] = ()


def head(source: Source, family: Family, weights: Mapping[str, Expr], differs: bool) -> Head:
    """What a checkpoint has for a head.

    Args:
        source: for its config.json.
        family: whose default counts when that leaves tie_word_embeddings out.
        weights: by the names of the family's table.
        differs: the head that is stored beside a table has other values, see `differs_in_share`.

    Raises:
        UserError: there is none.
    """
    says = _statements(source.config)
    has_head, has_table = HEAD in weights, EMBEDDING in weights
    tied = _is_tied(says, family, both=has_head and has_table)
    if tied and has_head and has_table and differs:
        notice = f"{HEAD} is kept: it differs from the embedding table, though {TIE} is true"
        return Head(False, weights, (notice,))
    if tied and has_head and has_table:
        if problem := adapted_head(weights[HEAD]):
            raise UserError(f"{source.root}: {problem}.")
        return Head(True, weights, (f"{HEAD} is the embedding table, so it is not read",))
    if tied and has_head:
        table = {EMBEDDING: weights[HEAD]}
        rest = {name: weight for name, weight in weights.items() if name != HEAD}
        return Head(True, rest | table, (f"{HEAD} is read as the embedding table: {TIE} is true",))
    if tied or has_head or not has_table:
        return Head(tied, weights)
    if is_base(source.config):
        notice = (
            "the checkpoint has no head: logits come from the embedding table; train it with "
            "logits_via_embedding=True"
        )
        return Head(True, weights, (notice,))
    stated = f"{TIE} is false" if says else f"{TIE} is left out of config.json, so it is false"
    raise UserError(
        f"{source.root} has no {HEAD}, but {stated}: download it again, or, if logits come from "
        f'the embedding table, write "{TIE}": true into config.json.'
    )


def head_problems(dims: Dims, weights: Mapping[str, Expr]) -> Iterator[str]:
    """A table or a head of other sizes than config.json says."""
    wanted = (dims.vocab, dims.emb)
    shapes = {name: weights[name].shape for name in (EMBEDDING, HEAD) if name in weights}
    if shapes.get(HEAD) == shapes.get(EMBEDDING):
        shapes.pop(HEAD, None)  # said once
    for name, shape in shapes.items():
        if shape != wanted:
            yield f"vocab_size={dims.vocab} and hidden_size={dims.emb}, but {name} is {shape}"


def differs_in_share(source: Source, facts: Mapping[str, Any] | None, share: slice) -> bool:
    """Whether the head differs from the table in some of the rows; False if it may not be tied.

    Args:
        source: it is read if it has both, and config.json says that they are one.
        facts: of the model_name.
        share: the part of the rows to compare, as fractions: slice(0, 1) for all.

    Raises:
        UserError: what `family_of` and `logical_tensors` raise.
    """
    family = family_of(source, facts)
    if not _is_tied(_statements(source.config), family, both=True):
        return False
    weights = logical_tensors(source, family).tensors
    if HEAD not in weights or EMBEDDING not in weights:
        return False
    ours, theirs = (_stored(weights[name]) for name in (EMBEDDING, HEAD))
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        return True
    return any(
        _rows_differ(source, source.tensors[a.name], source.tensors[b.name], share)
        for a, b in zip(ours, theirs, strict=True)
    )


def _statements(config: Mapping[str, Any]) -> list[bool]:
    """What the entries of config.json say: the outer one and those of the nested texts."""
    found, level = [], config
    for nested in ("thinker_config", "text_config", None):
        if isinstance(said := level.get(TIE), bool):
            found.append(said)
        if nested and isinstance(inner := level.get(nested), Mapping):
            level = inner
    return found


def _is_tied(says: list[bool], family: Family, both: bool) -> bool:
    """Where the entries disagree, a stored head is the model's, and without one there is none."""
    if not says:
        return family.ties
    return all(says) if both else any(says)


def _stored(weight: Expr) -> list[Tensor]:
    """What is stored of a weight, without what an adapter adds."""
    return [t for t in tensors(weight) if not is_part(t.name)]


def _rows_differ(source: Source, one: TensorInfo, other: TensorInfo, share: slice) -> bool:
    if not one.shape:
        return not np.array_equal(source.tensor(one.name), source.tensor(other.name))
    rows, *rest = one.shape
    step = max(1, _BLOCK // max(1, math.prod(rest) * one.dtype.itemsize))
    first, last = (int(rows * part) for part in (share.start, share.stop))
    for start in range(first, last, step):
        box = ((start, min(start + step, last)), *((0, n) for n in rest))
        ours, theirs = (_read(source, info, box) for info in (one, other))
        if not np.array_equal(ours, theirs, equal_nan=True):
            return True
    return False


def _read(source: Source, info: TensorInfo, box: tuple[tuple[int, int], ...]) -> np.ndarray:
    block = np.empty([stop - start for start, stop in box], info.dtype)
    source.read(info, [(box, block)])
    return block.astype(np.float32)
