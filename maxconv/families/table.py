"""Families: tables of rows that define each leaf, and how rows become leaves.

If a row's path contains `{layers}` and its tensor names `{l}`, it stands for each of some `Layers`.
Scanned, these are one leaf with a stacked axis, `decoder/layers/...`; unscanned, one leaf per
layer, `decoder/layers_0/...`. Nothing else in a family depends on whether layers are scanned.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from maxconv.algebra import AlgebraError, Expr, Shape, Stacked, bind, tensors
from maxconv.families.dims import REQUIRED, Dims, stated, stated_sizes
from maxconv.families.settings import Computation

Numbers = int | Sequence["Numbers"]  # of HF layers: one, a stack, or a stack of stacks


@dataclass(frozen=True)
class Layers:
    """Layers of the checkpoint that have the same structure, and their places in MaxText's tree.

    Attributes:
        scanned: pairs of a value for `{layers}` and the HF layer numbers that are stacked there; a
            single number is not stacked.
        unscanned: the same for unscanned layers.
        axes: logical names of the stacked axes, outermost first; a stack of fewer axes has the
            last.
    """

    scanned: tuple[tuple[str, Numbers], ...]
    unscanned: tuple[tuple[str, int], ...]
    axes: tuple[str, ...] = ("layers",)


def uniform(count: int, name: str = "layers", first: int = 0) -> Layers:
    """`count` HF layers from `first` on, in one stack `name`; unscanned `name_0`, `name_1`, ..."""
    numbers = range(first, first + count)
    one_by_one = tuple((f"{name}_{i}", n) for i, n in enumerate(numbers))
    return Layers(((name, tuple(numbers)),) if count else (), one_by_one, (name,))


def unrolled(count: int, name: str) -> Layers:
    """Layers that are never stacked: `name_0`, `name_1`, ..."""
    one_by_one = tuple((f"{name}_{i}", i) for i in range(count))
    return Layers(one_by_one, one_by_one)


@dataclass(frozen=True)
class Row:
    """A parameter, or one per layer: its path in MaxText's tree, logical axes, and expression.

    Attributes:
        expr: over tensors whose names may contain `{l}` (layer) and `{e}` (expert).
        experts: number of experts to stack, if its names contain `{e}`.
        dtype: if it is not the saved dtype.
        stack: axis along which layers are stacked, if it is not MaxText's param_scan_axis.
        layers: the layers that have this parameter, see `each`.
    """

    path: str
    logical: tuple[str, ...]
    expr: Expr
    experts: int = 0
    dtype: str | None = None
    stack: int | None = None
    layers: Layers | None = None

    @property
    def times(self) -> int:
        """Number of parameters that it stands for, counting each layer and expert."""
        return (len(self.layers.unscanned) if self.layers else 1) * max(self.experts, 1)

    def names(self, layers: Iterable[int] | None = None) -> set[str]:
        """The names of the tensors that it reads, for some HF layers or all of its own."""
        if layers is None:
            layers = [n for _, n in self.layers.unscanned] if self.layers else [0]
        templates = [t.name for t in tensors(self.expr)]
        experts = range(max(self.experts, 1))
        return {name.format(l=n, e=e) for name in templates for n in layers for e in experts}


def row(
    path: str,
    logical: str,
    expr: Expr,
    experts: int = 0,
    dtype: str | None = None,
    stack: int | None = None,
) -> Row:
    """A row; `logical`: names of its axes, without those of stacked layers; `-` for no name."""
    return Row(path, tuple(logical.split()), expr, experts, dtype, stack)


def cycle(count: int, n: int, name: str = "layers") -> list[Layers]:
    """Layers of `n` alternating kinds: `layers/{name}_k` stacks the kth layer of each cycle.

    Layers of an incomplete last cycle are `layers_remainder/{name}_k`, not stacked.
    """
    whole = count - count % n
    kinds = []
    for k in range(min(n, count)):
        stacks: list[tuple[str, Numbers]] = []
        if whole:
            stacks.append((f"layers/{name}_{k}", tuple(range(k, whole, n))))
        if whole + k < count:
            stacks.append((f"layers_remainder/{name}_{k}", whole + k))
        one_by_one = tuple((f"layers_{i}", i) for i in range(k, count, n))
        kinds.append(Layers(tuple(stacks), one_by_one))
    return kinds


def pairs(count: int) -> list[Layers]:
    """For MaxText layers of two HF layers each: all first ones, and all second ones."""
    return [
        Layers(
            (("layers", tuple(range(k, count, 2))),),
            tuple((f"layers_{i}", 2 * i + k) for i in range(count // 2)),
        )
        for k in range(2)
    ]


def each(layers: Layers, *blocks: Iterable[Row]) -> Iterator[Row]:
    """Rows that each of some layers has; they contain `{layers}` and `{l}`, see `Row`."""
    return (replace(r, layers=layers) for block in blocks for r in block)


@dataclass(frozen=True)
class Family:
    """A model family: the checkpoints it reads, and the MaxText decoder it makes.

    Attributes:
        architectures: their names in `config.json`; the first is used in messages.
        decoder_block: MaxText's name.
        model_types: their names in `config.json`, for files without architectures.
        ties: the default of tie_word_embeddings in transformers' configuration class.
        spare_rows: number of rows at the end of the published embedding tables that belong to no
            token, and that MaxText's tables do not have.
        marked_by: an entry of config.json that is non-zero only in this family, if another one
            (later in FAMILIES) has the same architectures.
        rows: returns the table for given sizes.
        sizes: the class of the sizes.
        names: pairs of a tensor name in some checkpoints and its canonical name, see
            `maxconv.models.canonical_names.renamer`.
        ignored: patterns of tensors that have no parameter in MaxText.
        spare: returns more of these for given sizes.
        predicts: name suffix of a tensor that only layers for multi-token prediction have, which
            come after the others, if MaxText has such layers.
        encoders: patterns of tensors that have a parameter only with use_multimodal.
        audio_patterns: patterns of tensors that have a parameter only with use_audio.
        fuse_experts: name suffixes of the table's tensors of all experts; and, for each, those of
            the tensors per expert `{e}` that some checkpoints have instead, to be concatenated on
            the first axis.
        split_experts: the opposite: the table has a tensor per expert, and some checkpoints have
            one tensor of all experts.
        transposed_experts: name suffixes of a layer's fused gate and up projections, and of its
            down projections, which some checkpoints store transposed.
        in_memory: pairs of a prefix of published tensor names and what transformers 5 has instead,
            once it has loaded them; None if its names are not known. That it has experts in one
            tensor goes without saying.
        scans: whether MaxText can stack its layers.
        pads_vocab: whether MaxText pads or cuts the embedding to its own vocab_size.
        computes: what it computes with, beside sizes.
        layers_per_block: number of HF layers per layer of base_num_decoder_layers.
        in_blocks: returns the sizes in units of blocks, if MaxText can keep fp8 weights with a
            scale per block; the scales are then the kernels of a smaller model.
    """

    architectures: tuple[str, ...]
    decoder_block: str
    rows: Callable[[Any], Iterable[Row]]
    sizes: type[Dims] = Dims
    model_types: tuple[str, ...] = ()
    ties: bool = False
    spare_rows: int = 0
    names: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    spare: Callable[[Any], Iterable[str]] = lambda d: ()
    predicts: str = ""
    encoders: tuple[str, ...] = ()
    audio_patterns: tuple[str, ...] = ()
    fuse_experts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    split_experts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    transposed_experts: tuple[tuple[str, str], ...] = ()
    in_memory: tuple[tuple[str, str], ...] | None = ()
    scans: bool = True
    pads_vocab: bool = False
    computes: Computation = Computation()
    layers_per_block: int = 1
    marked_by: str = ""
    in_blocks: Callable[[Any, int], Dims] | None = None

    def fits(self, hf_config: Mapping[str, Any]) -> bool:
        """Whether a config.json with one of the architectures belongs to this family."""
        return not self.marked_by or any(stated(hf_config, [self.marked_by]).values())

    def dims(self, hf_config: Mapping[str, Any]) -> Dims:
        """The sizes in config.json; KeyError with the name of an entry that is missing."""
        known = {
            f.name: next(iter(stated.values()))
            for f in fields(self.sizes)
            if (stated := stated_sizes(hf_config, f))
        }
        return self.complete({"tied": self.ties, **known})

    def complete(self, known: Mapping[str, Any]) -> Dims:
        """Completes known sizes with the defaults of transformers' configuration classes.

        Raises:
            KeyError: with the name of an entry of config.json that is missing.
        """
        found: dict[str, Any] = {}
        for f in fields(self.sizes):
            if f.name in known:
                found[f.name] = known[f.name]
            elif (default := f.metadata["default"]) is REQUIRED:
                raise KeyError(f.metadata["hf"][0])
            else:
                found[f.name] = default(found) if callable(default) else default
        return self.sizes(**found)

    def leaves_out(self, name: str, dims: Dims) -> bool:
        """Whether a tensor is deliberately not in the table."""
        unwanted = (
            *self.ignored,
            *self.spare(dims),
            *(() if dims.multimodal else self.encoders),
            *(() if dims.audio else self.audio_patterns),
        )
        return any(fnmatchcase(name, pattern) for pattern in unwanted)


@dataclass(frozen=True)
class Parameter:
    """A parameter of MaxText's tree: its path, logical axes, and bound expression.

    `dtype`: if it is not the saved dtype.
    """

    path: tuple[str, ...]
    logical: tuple[str | None, ...]
    expr: Expr
    dtype: str | None = None

    @property
    def name(self) -> str:
        """As Orbax names it in a MaxText checkpoint: `params.params.decoder...`."""
        return ".".join(("params", *self.path))

    @property
    def shape(self) -> Shape:
        return self.expr.shape

    @cached_property
    def tensors(self) -> tuple[str, ...]:
        """The names of the tensors it is computed from, with repeats."""
        return tuple(tensor.name for tensor in tensors(self.expr))


def bind_rows(
    rows: Iterable[Row], shapes: Mapping[str, Shape], scan_axis: int | None
) -> tuple[list[Parameter], list[str]]:
    """Every parameter in the order of MaxText's tree, and a phrase for each row that fails.

    Args:
        rows: a family's table.
        shapes: shape of each tensor of the checkpoint.
        scan_axis: MaxText's param_scan_axis, or None for unscanned layers.
    """
    leaves, problems = [], []
    for r in rows:
        for path, logical, indices in _instances(r, scan_axis):
            try:
                expr = bind(r.expr, shapes, indices)
                leaf = Parameter(("params", *path.split("/")), logical, expr, r.dtype)
                if len(leaf.shape) != len(logical):
                    raise AlgebraError(f"shape {leaf.shape} does not match the axes {logical}")
                leaves.append(leaf)
            except AlgebraError as error:
                problems.append(f"{path}: {error}")
    return sorted(leaves, key=lambda leaf: leaf.path), problems


def _instances(
    r: Row, scan_axis: int | None
) -> Iterator[tuple[str, tuple[str | None, ...], dict[str, int | Stacked]]]:
    """Path, logical axes, and layer and expert indices of each leaf that a row stands for."""
    named = tuple(None if name == "-" else name for name in r.logical)
    experts: dict[str, int | Stacked] = {"e": Stacked(range(r.experts), 0)} if r.experts else {}
    if r.layers is None:
        yield r.path, named, experts
        return
    for path, numbers in r.layers.unscanned if scan_axis is None else r.layers.scanned:
        at = r.path.format(layers=path)
        if isinstance(numbers, int):
            yield at, named, {"l": numbers, **experts}
        else:
            axis = min((scan_axis or 0) if r.stack is None else r.stack, len(named))
            logical = (*named[:axis], *r.layers.axes[-_depth(numbers) :], *named[axis:])
            yield at, logical, {"l": Stacked(numbers, axis), **experts}


def paths(rows: Iterable[Row], scan_axis: int | None) -> set[str]:
    """The path of every parameter, see `bind_rows`; no tensors are needed for it."""
    return {path for r in rows for path, _, _ in _instances(r, scan_axis)}


def stack_lengths(rows: Iterable[Row], scan_axis: int | None) -> dict[str, dict[int, int]]:
    """For each path, the lengths of its stacked axes; empty for one that is not stacked."""
    found: dict[str, dict[int, int]] = {}
    for r in rows:
        for path, _, indices in _instances(r, scan_axis):
            stacked, lengths = indices.get("l"), found.setdefault(path, {})
            while isinstance(stacked, Stacked):
                lengths[stacked.axis + len(lengths)] = len(stacked.numbers)
                stacked = next(iter(stacked), None)
    return found


def flat(numbers: Numbers) -> list[int]:
    """The HF layer numbers in a stack, or in a stack of stacks."""
    return [numbers] if isinstance(numbers, int) else [n for one in numbers for n in flat(one)]


def _depth(numbers: Numbers) -> int:
    return 0 if isinstance(numbers, int) else 1 + max(map(_depth, numbers), default=0)
