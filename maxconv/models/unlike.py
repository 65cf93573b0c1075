"""What a checkpoint has that MaxText's decoder of its family has not: each kind is named."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from maxconv.algebra import AlgebraError, Expr, tensors, unused
from maxconv.families import FAMILIES, Dims, Family, Row, bind_rows, stated

_MLP = re.compile(r"model\.layers\.({l}|[0-9]{1,9})\.\w+\.up_proj\.weight")
_NUMBER = re.compile(r"(?<=\.)[0-9]+(?=\.)")
# What transformers calls the layers without experts.
_DENSE = ("mlp_only_layers", "decoder_sparse_step", "moe_layer_freq", "first_k_dense_replace")


def dense_layers(
    config: Mapping[str, Any],
    family: Family,
    dims: Dims,
    rows: Sequence[Row],
    names: Mapping[str, Expr],
) -> Iterator[str]:
    """A sentence if there are layers without experts where MaxText's decoder has experts.

    Args:
        config: the checkpoint's config.json.
        family, dims: the model.
        rows: its table.
        names: the checkpoint's tensors, by canonical name.
    """
    if dims.experts < 2:
        return
    meant: set[int] = set()
    for row in rows:
        if row.layers and any(_MLP.fullmatch(t.name) for t in tensors(row.expr)):
            meant.update(number for _, number in row.layers.unscanned)
    dense = {int(match[1]) for name in names if (match := _MLP.fullmatch(name))}
    if found := sorted(n for n in dense - meant if n < dims.layers):
        entries = stated(config, _DENSE).items()
        said = ", ".join(f"{key}={value}" for key, value in entries if value not in (1, []))
        mend = (
            f"base_num_decoder_layers={found[0]} converts those before"
            if found[0]
            else "convert a model that has experts in all layers"
        )
        yield (
            f"layers {_listed(found)} have no experts{said and f' ({said} in config.json)'}, but "
            f"those of MaxText's {family.architectures[0]} have; {mend}."
        )


def without_counterpart(
    family: Family, dims: Dims, weights: Mapping[str, Expr], left: Sequence[str]
) -> Iterator[str]:
    """A sentence for each kind of tensor that the table has no row for.

    Args:
        family, dims: the model.
        weights: all tensors of the checkpoint, by canonical name.
        left: the names of those without a row.
    """
    kinds: dict[str, list[str]] = {}
    for name in left:
        kinds.setdefault(_NUMBER.sub("*", name), []).append(next(tensors(weights[name])).name)
    biases = all(name.endswith(".bias") for name in left)
    twin = _twin(family, dims, weights) if left else None
    mend = ""
    if twin is not None:
        mend = (
            f"; its tensors are those of {twin}: if it computes the same, write that into "
            "architectures of config.json"
        )
    elif biases and left:
        mend = "; MaxText's decoder has no such bias, so it cannot train this model"
    for found in kinds.values():
        one = len(found) == 1
        yield (
            f"tensor {found[0]}{'' if one else f' and {len(found) - 1} of its kind'} "
            f"{'has' if one else 'have'} no counterpart in {family.architectures[0]}{mend}"
        )


def _twin(family: Family, dims: Dims, weights: Mapping[str, Expr]) -> str | None:
    """An architecture whose table has a row for each tensor, and a tensor for each row."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    sizes = {f.name: getattr(dims, f.name) for f in fields(dims)}
    for other in FAMILIES:
        known = {f.name: sizes[f.name] for f in fields(other.sizes) if f.name in sizes}
        if other is family:
            continue
        try:
            bound, problems = bind_rows(other.rows(other.complete(known)), shapes, None)
        except (KeyError, AlgebraError):
            continue
        if not problems and not [*unused({p.name: p.expr for p in bound}, list(shapes))]:
            return other.architectures[0]
    return None


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    more = f" and {len(numbers) - most} more" if len(numbers) > most else ""
    return ", ".join(map(str, numbers[:most])) + more
