"""Converts a LoRA adapter alone, using the table of its model.

A kernel has input axes and output axes. The update of its weight W is the product B A of the
adapter: A has the input axes, B the output axes. So whatever a row does to input axes is applied to
A, and what it does to output axes, or a scale, to B. MaxText stores A as (inputs, rank) and B as
(rank, outputs), replicated, with inputs and outputs flattened.
"""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any

from maxconv.algebra import (
    Affine,
    Apply,
    Expr,
    Fill,
    Fit,
    Op,
    Pattern,
    Slice,
    Tensor,
    hf,
    rearrange,
    scale,
)
from maxconv.errors import UserError
from maxconv.families import BY_ARCHITECTURE, Dims, Family, Row, flat
from maxconv.models import schema
from maxconv.models.adapter_config import config_problems, scaling
from maxconv.models.lora import check, missing_parts, pairs
from maxconv.models.resolve import Model, unit
from maxconv.models.stored_names import renamer
from maxconv.sources import Source

IN, OUT = "A", "B"  # the input and output sides of a weight, named after their factors
RANK = "rank"
_MOST_TENSORS = 1 << 20  # in the adapter's model


def adapter_model(
    adapter: Source,
    name: str | None,
    facts: Mapping[str, Any] | None,
    words: Mapping[str, Any],
    scans: bool,
) -> Model:
    """An adapter as a `Model`, whose parameters are the factors A and B.

    Args:
        adapter: as saved by PEFT: its `config` is adapter_config.json.
        name, facts: MaxText's name and configuration of the model that it adapts.
        words: sizes given as arguments, which override `facts`.
        scans: whether layers are stacked. Layers of a stack that are not adapted are zeros.

    Raises:
        UserError: with every tensor that matches no weight, and everything that is not plain LoRA.
    """
    if name is None or facts is None:
        raise UserError("Converting an adapter alone needs the name of its model: add model_name=.")
    check(config_problems(adapter.config, alone=True), adapter)
    family, dims = described(name, {"mtp_num_layers": 0, **facts, **words})
    rows = list(family.rows(dims))
    _check_count(rows, name, dims)
    adaptable = [a for r in rows if (a := Adaptable.of(r))]
    found, problems = _found(adapter, family, adaptable)
    check(problems, adapter)
    parts, tensors = list[Row](), dict[str, Expr]()
    for one in adaptable:
        adapted = one.restricted(found.keys(), scans)
        if adapted is not None:
            parts += adapted.rows
            tensors |= adapted.tensors(found)
    notices = (
        "only the adapter is converted; to merge it into its model, add --hf_model_path=",
        "lora.lora_restore_path of MaxText 0.2.5 expects a tree without params/params/, which "
        "neither this checkpoint nor that of MaxText's own converter has",
    )
    return Model(
        family,
        dims,
        dims,
        tuple(parts),
        tensors,
        notices,
        rounds=False,
        metadata=_lora(adapter),
    )


def _check_count(rows: Sequence[Row], name: str, dims: Dims) -> None:
    if sum(r.times for r in rows) > _MOST_TENSORS:
        raise UserError(
            f"{name} would have {dims.layers} layers and {dims.experts} experts, more than an "
            "adapter can be converted for; remove the sizes from the arguments."
        )


def _found(
    adapter: Source, family: Family, adaptable: Sequence["Adaptable"]
) -> tuple[dict[str, dict[str, Expr]], list[str]]:
    """The factors of each adapted weight, and problems with them."""
    rename = renamer(family.names)
    weights = set().union(*(a.row.names() for a in adaptable))
    found, problems = pairs(adapter, lambda n: rename(n)[0], weights, alone=True)
    problems += missing_parts(found)
    ranks = {parts[IN].shape[0] for parts in found.values() if IN in parts}
    stated = _rank(adapter)
    if ranks and ranks != {stated}:
        have = " and ".join(map(str, sorted(ranks)))
        problems.append(f"adapter_config.json: r={stated}, but the tensors have rank {have}")
    return found, problems


def described(name: str, facts: Mapping[str, Any]) -> tuple[Family, Dims]:
    """The family and sizes of a model from MaxText's configuration, without a checkpoint."""
    (family,) = (
        family
        for family in BY_ARCHITECTURE[facts["architecture"]]
        if family.decoder_block == facts["decoder_block"]
    )
    sizes = {
        f.name: said * n if (n := unit(f.name, family)) > 1 else said
        for f in fields(family.sizes)
        if (said := facts.get(f.metadata["maxtext"])) is not None
    }
    try:
        return family, family.complete(sizes)
    except KeyError as error:
        raise UserError(
            f"MaxText's configuration of {name} lacks {error}, so adapters for it cannot be "
            "converted alone; add --hf_model_path= to merge the adapter."
        ) from None


@dataclass(frozen=True)
class Adaptable:
    """The row of a kernel, the expressions of the adapter's factors for it, and the side of each
    axis that one layer (of one expert) has."""

    row: Row
    parts: Mapping[str, Expr]
    sides: tuple[str, ...]

    @classmethod
    def of(cls, r: Row) -> "Adaptable | None":
        """None unless the row is a kernel made from one weight, (outputs, inputs)."""
        is_kernel = r.path.endswith("/kernel") or r.experts
        found = _parts(r.expr) if is_kernel else None
        return cls(r, *found) if found else None

    def restricted(self, adapted: Set[str], scans: bool) -> "Adaptable | None":
        """Restricted to leaves that have adapted weights; None if there are none."""
        r = self.row
        if r.layers is None:
            return None if r.names().isdisjoint(adapted) else self
        places = r.layers.scanned if scans else r.layers.unscanned
        kept = tuple((p, n) for p, n in places if not r.names(flat(n)).isdisjoint(adapted))
        each = tuple((path, number) for path, numbers in kept for number in flat(numbers))
        layers = replace(r.layers, scanned=kept, unscanned=each)
        return replace(self, row=replace(r, layers=layers)) if kept else None

    @property
    def rows(self) -> Iterator[Row]:
        """A row for each factor."""
        at = self.row.path.removesuffix("/kernel")
        logical = ("-", "-", "-") if self.row.experts else ("-", "-")
        for letter, expr in self.parts.items():
            path = f"{at}/kernel_lora_{letter.lower()}/value"
            yield replace(self.row, path=path, logical=logical, expr=expr)

    def tensors(self, found: Mapping[str, Mapping[str, Expr]]) -> dict[str, Expr]:
        """The tensors that its rows use; zeros for weights that are not adapted."""
        names = self.row.names()
        like = found[next(name for name in sorted(names) if name in found)]
        zeros = {letter: Fill(part.shape, 0.0) for letter, part in like.items()}
        return {
            _part_name(name, letter): part
            for name in names
            for letter, part in found.get(name, zeros).items()
        }


def _part_name(weight: str, letter: str) -> str:
    return f"{weight.removesuffix('.weight')}.lora_{letter}"


def _parts(template: Expr) -> tuple[dict[str, Expr], tuple[str, ...]] | None:
    """The factors of a kernel, and the side of each of its axes; None if it cannot be adapted."""
    ops: list[Op | Pattern] = []
    while isinstance(template, Apply):
        ops.insert(0, template.op)
        template = template.x
    if not isinstance(template, Tensor):
        return None
    sides: Sequence[str] = (OUT, IN)  # of each axis
    parts: dict[str, Expr] = {letter: hf(_part_name(template.name, letter)) for letter in (IN, OUT)}
    for op in ops:
        match op:
            case Pattern():
                after = _sides_after(op, sides)
                if after is None:
                    return None
                for letter in parts:
                    parts[letter] = parts[letter] >> _of_part(op, sides, after, letter)
                sides = after
            case Slice(axis) | Fit(axis):
                letter = sides[axis]
                own = replace(op, axis=_axes(sides, letter).index(axis))
                parts[letter] = parts[letter] >> own
            case Affine(shift=0.0):
                parts[OUT] = parts[OUT] >> replace(scale(op.scale), wide=True)
            case _:
                return None
    flat_parts = {letter: part >> _flat(sides, letter) for letter, part in parts.items()}
    return flat_parts, tuple(sides)


def _sides_after(op: Pattern, sides: Sequence[str]) -> list[str] | None:
    """The side of each axis after a rearrangement; None if it mixes sides or does not apply."""
    before, after = op.groups
    if len(before) != len(sides):
        return None
    of = {atom: side for group, side in zip(before, sides, strict=True) for atom in group}
    found = [{of[atom] for atom in group} for group in after]
    return [side for (side,) in found] if all(len(side) == 1 for side in found) else None


def _axes(sides: Sequence[str], letter: str) -> list[int]:
    """The axes of a factor: those of its side, with the rank in place of the first other axis."""
    other = next(i for i, side in enumerate(sides) if side != letter)
    return [i for i, side in enumerate(sides) if side == letter or i == other]


def _of_part(op: Pattern, before: Sequence[str], after: Sequence[str], letter: str) -> Pattern:
    """A rearrangement of the weight, restricted to one factor."""
    texts = []
    for groups, sides in zip(op.groups, (before, after), strict=True):
        own = (groups[i] if sides[i] == letter else [RANK] for i in _axes(sides, letter))
        texts.append(" ".join(f"({' '.join(group)})" for group in own))
    text = " -> ".join(texts)
    atoms = text.replace("(", " ").replace(")", " ").split()
    return rearrange(text, **{name: n for name, n in op.sizes if name in atoms})


def _flat(sides: Sequence[str], letter: str) -> Pattern:
    names = [f"x{i}" if sides[i] == letter else RANK for i in _axes(sides, letter)]
    own = f"({' '.join(name for name in names if name != RANK)})"
    return rearrange(f"{' '.join(names)} -> {f'{own} {RANK}' if letter == IN else f'{RANK} {own}'}")


def _lora(adapter: Source) -> dict[str, Any]:
    """MaxText's metadata for an adapter; MaxText scales by alpha / rank."""
    rank, alpha = _rank(adapter), schema.entry(adapter.config, "lora_alpha", 8)
    return {"lora": {"lora_rank": rank, "lora_alpha": rank * scaling(alpha, rank, adapter.config)}}


def _rank(adapter: Source) -> int:
    return schema.entry(adapter.config, "r", 8)  # PEFT's default
