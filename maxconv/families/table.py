"""What a family is: rows that say where each leaf comes from, and how rows become leaves.

A row's path may hold `{layers}` and its names `{l}`: such a row stands for each of some `Layers`.
Scanned, these are one leaf with a stacked axis, `decoder/layers/...`; unscanned, one leaf a layer,
`decoder/layers_0/...`. Nothing else in a family knows the difference.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from maxconv.algebra import AlgebraError, Expr, Shape, Stacked, bind, tensors
from maxconv.families.dims import REQUIRED, Dims, stated, stated_sizes

Numbers = int | Sequence["Numbers"]  # of HF layers: one, some to be stacked, or stacks of stacks


@dataclass(frozen=True)
class Layers:
    """Layers of the checkpoint that are alike, and where MaxText's tree has them.

    Attributes:
        scanned: what `{layers}` stands for, and the HF layer numbers that are stacked there; one
            number alone is not stacked.
        unscanned: the same when layers stand one by one.
        axes: logical names of the stacked axes, outermost first; of a stack with fewer, the last.
    """

    scanned: tuple[tuple[str, Numbers], ...]
    unscanned: tuple[tuple[str, int], ...]
    axes: tuple[str, ...] = ("layers",)


def uniform(count: int, name: str = "layers", first: int = 0) -> Layers:
    """`count` layers from HF's `first` in one stack, `name`; or `name_0` and so on."""
    numbers = range(first, first + count)
    one_by_one = tuple((f"{name}_{i}", n) for i, n in enumerate(numbers))
    return Layers(((name, tuple(numbers)),) if count else (), one_by_one, (name,))


def unrolled(count: int, name: str) -> Layers:
    """Layers that stand one by one in any case: `name_0` and so on."""
    one_by_one = tuple((f"{name}_{i}", i) for i in range(count))
    return Layers(one_by_one, one_by_one)


@dataclass(frozen=True)
class Row:
    """One parameter: its path in MaxText's tree, its logical axes, and its template.

    `experts`: how many there are, if it is one of each. `dtype`: if not what is saved. `stack`: the
    axis of stacked layers, if not MaxText's param_scan_axis. `layers`: of which it is one each, see
    `each`.
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
        """How many parameters of single layers and experts it stands for."""
        return (len(self.layers.unscanned) if self.layers else 1) * max(self.experts, 1)

    def names(self, layers: Iterable[int] | None = None) -> set[str]:
        """The tensors that it reads; of some HF layers, or of all it is of."""
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
    """A row; `logical` names the axes, without those of stacked layers; `-` has no name."""
    return Row(path, tuple(logical.split()), expr, experts, dtype, stack)


def cycle(count: int, n: int, name: str = "layers") -> list[Layers]:
    """Layers of `n` kinds in turn: `layers/{name}_k` stacks the kth of each cycle.

    Those of a last cycle that is not whole are `layers_remainder/{name}_k`, not stacked.
    """
    whole = count - count % n
    kinds = []
    for k in range(n):
        stacks: list[tuple[str, Numbers]] = []
        if whole:
            stacks.append((f"layers/{name}_{k}", tuple(range(k, whole, n))))
        if whole + k < count:
            stacks.append((f"layers_remainder/{name}_{k}", whole + k))
        one_by_one = tuple((f"layers_{i}", i) for i in range(k, count, n))
        kinds.append(Layers(tuple(stacks), one_by_one))
    return kinds


def pairs(count: int) -> list[Layers]:
    """Two HF layers in one of MaxText's: the first of each pair, and the second."""
    return [
        Layers(
            (("layers", tuple(range(k, count, 2))),),
            tuple((f"layers_{i}", 2 * i + k) for i in range(count // 2)),
        )
        for k in range(2)
    ]


def each(layers: Layers, *blocks: Iterable[Row]) -> Iterator[Row]:
    """The rows of each layer: `{layers}` in their paths and `{l}` in their names is filled in."""
    return (replace(r, layers=layers) for block in blocks for r in block)


@dataclass(frozen=True)
class Family:
    """An architecture: which checkpoints it reads, which MaxText decoder it makes.

    Attributes:
        architectures: as `config.json` names them; the first is also what messages call it.
        decoder_block: MaxText's name.
        marked_by: an entry of config.json, not 0 there, that tells this family from one of the same
            architectures that comes after it.
        rows: the table, given the sizes.
        sizes: the class of these.
        names: what tensors are called in some checkpoints, and what the table calls them, see
            `maxconv.naming`.
        ignored: patterns of tensors that MaxText has no parameter for.
        spare: more of these, given the sizes.
        encoders: patterns of those that it has one for only with use_multimodal.
        audio_patterns: patterns of those that it has one for only with use_audio.
        fuse_experts: how the names end of tensors that hold all experts; and of those, one for each
            expert `{e}`, that some checkpoints hold instead: these are concatenated on the first
            axis.
        split_experts: the same where the table has a tensor for each expert, and some checkpoints
            hold one for all.
        transposed_experts: how the names end of a layer's fused gate and up projections, and of its
            down projections, which some checkpoints hold with rows and columns exchanged.
        scans: MaxText can stack its layers.
        pads_vocab: MaxText pads or cuts the embedding to its own vocab_size for this family.
        train_with: what MaxText must be told to train such a model when no model_name says it.
        layers_per_block: HF layers in one of those that base_num_decoder_layers counts.
        in_blocks: the sizes in blocks of so many numbers, where MaxText can keep fp8 weights and
            the scale of each block. So scales are the kernels of a smaller model.
    """

    architectures: tuple[str, ...]
    decoder_block: str
    rows: Callable[[Any], Iterable[Row]]
    sizes: type[Dims] = Dims
    names: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    spare: Callable[[Any], Iterable[str]] = lambda d: ()
    encoders: tuple[str, ...] = ()
    audio_patterns: tuple[str, ...] = ()
    fuse_experts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    split_experts: tuple[tuple[str, tuple[str, ...]], ...] = ()
    transposed_experts: tuple[tuple[str, str], ...] = ()
    scans: bool = True
    pads_vocab: bool = False
    train_with: str = ""
    layers_per_block: int = 1
    marked_by: str = ""
    in_blocks: Callable[[Any, int], Dims] | None = None

    def fits(self, hf_config: Mapping[str, Any]) -> bool:
        """Whether a config.json, of one of the architectures, is of this family."""
        return not self.marked_by or any(stated(hf_config, [self.marked_by]).values())

    def dims(self, hf_config: Mapping[str, Any], names: Iterable[str]) -> Dims:
        """The sizes that config.json states; KeyError names the entry that is missing.

        Whether the table is tied is left out of some files: then an lm_head among `names` decides.
        """
        known = {
            f.name: next(iter(stated.values()))
            for f in fields(self.sizes)
            if (stated := stated_sizes(hf_config, f))
        }
        if "tied" not in known:
            known["tied"] = "lm_head.weight" not in names
        return self.complete(known)

    def complete(self, known: Mapping[str, Any]) -> Dims:
        """Sizes of which some are known; KeyError names the entry of a config.json that is missing.

        The others default as transformers' configuration classes do.
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
        """Whether the table has no row for a tensor on purpose."""
        unwanted = (
            *self.ignored,
            *self.spare(dims),
            *(() if dims.multimodal else self.encoders),
            *(() if dims.audio else self.audio_patterns),
        )
        return any(fnmatchcase(name, pattern) for pattern in unwanted)


@dataclass(frozen=True)
class Parameter:
    """A parameter of MaxText's tree: path below `params`, logical axes, bound expression.

    `dtype`: if not what is saved.
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
        """The names of all that it is made of, with repeats."""
        return tuple(tensor.name for tensor in tensors(self.expr))


def bind_rows(
    rows: Iterable[Row], shapes: Mapping[str, Shape], scan_axis: int | None
) -> tuple[list[Parameter], list[str]]:
    """Every leaf, in the order of MaxText's tree, and a sentence for each row that does not fit.

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
                    raise AlgebraError(f"{leaf.shape} has not the axes {logical}")
                leaves.append(leaf)
            except AlgebraError as error:
                problems.append(f"{path}: {error}")
    return sorted(leaves, key=lambda leaf: leaf.path), problems


def _instances(
    r: Row, scan_axis: int | None
) -> Iterator[tuple[str, tuple[str | None, ...], dict[str, int | Stacked]]]:
    """The path, logical axes and indices of each leaf that a row stands for."""
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


def flat(numbers: Numbers) -> list[int]:
    """The HF layers in a stack, or in stacks of stacks."""
    return [numbers] if isinstance(numbers, int) else [n for one in numbers for n in flat(one)]


def _depth(numbers: Numbers) -> int:
    return 0 if isinstance(numbers, int) else 1 + max(map(_depth, numbers), default=0)
