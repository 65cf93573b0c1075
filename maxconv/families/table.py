"""What a family is: rows that say where each leaf comes from, and how rows become leaves.

A row's path may hold `{layers}` and its names `{l}`: such a row stands for each of some `Layers`.
Scanned, these are one leaf with a stacked axis, `decoder/layers/...`; unscanned, one leaf a layer,
`decoder/layers_0/...`. Nothing else in a family knows the difference.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from maxconv.algebra import AlgebraError, Expr, Shape, Stacked, bind


@dataclass(frozen=True)
class Dims:
    """The sizes of a decoder, in MaxText's terms.

    `vocab` is MaxText's, which may be padded. `layers` may be fewer than the checkpoint has.
    `tied`: logits come from the embedding table. `moe_mlp` is the width of an expert.
    """

    emb: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    tied: bool
    experts: int = 1
    moe_mlp: int = -1


@dataclass(frozen=True)
class Layers:
    """Layers of the checkpoint that are alike, and where MaxText's tree has them.

    Attributes:
        scanned: path below `decoder`, and the HF layer numbers that are stacked there; one number
            alone is not stacked.
        unscanned: the same when layers stand one by one.
        axis: logical name of a stacked axis.
    """

    scanned: tuple[tuple[str, int | tuple[int, ...]], ...]
    unscanned: tuple[tuple[str, int], ...]
    axis: str = "layers"


def uniform(count: int) -> Layers:
    """All layers in one stack, or `layers_0` and so on."""
    one_by_one = tuple((f"layers_{i}", i) for i in range(count))
    return Layers((("layers", tuple(range(count))),), one_by_one)


@dataclass(frozen=True)
class Row:
    """One parameter: its path in MaxText's tree, its logical axes, and its template.

    `experts`: how many there are, if it is one of each. `dtype`: if not what is saved. `layers`: of
    which it is one each, see `each`.
    """

    path: str
    logical: tuple[str, ...]
    expr: Expr
    experts: int = 0
    dtype: str | None = None
    layers: Layers | None = None


def row(path: str, logical: str, expr: Expr, experts: int = 0, dtype: str | None = None) -> Row:
    """A row; `logical` names the axes, without that of stacked layers; `-` has no name."""
    return Row(path, tuple(logical.split()), expr, experts, dtype)


def cycle(count: int, n: int) -> list[Layers]:
    """Layers of `n` kinds in turn: `layers/layers_k` stacks the kth of each cycle."""
    return [
        Layers(
            ((f"layers/layers_{k}", tuple(range(k, count, n))),),
            tuple((f"layers_{i}", i) for i in range(k, count, n)),
        )
        for k in range(n)
    ]


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


# Which entry of config.json states a field of Dims.
HF_KEYS: dict[str, tuple[str, ...]] = {
    "emb": ("hidden_size",),
    "mlp": ("intermediate_size",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "layers": ("num_hidden_layers",),
    "vocab": ("vocab_size",),
    "tied": ("tie_word_embeddings",),
    "experts": ("num_experts", "num_local_experts"),
    "moe_mlp": ("moe_intermediate_size",),
}


@dataclass(frozen=True)
class Family:
    """An architecture: which checkpoints it reads, which MaxText decoder it makes.

    Attributes:
        architectures: as `config.json` names them; the first is also what messages call it.
        decoder_block: MaxText's name.
        rows: the table, given the sizes.
        ignored: patterns of tensors that MaxText has no parameter for.
        pads_vocab: MaxText pads or cuts the embedding to its own vocab_size for this family.
        train_with: what MaxText must be told to train such a model when no model_name says it.
        layers_per_block: HF layers in one of those that base_num_decoder_layers counts.
        renamed_keys: fields of Dims that config.json states under a name of its own.
    """

    architectures: tuple[str, ...]
    decoder_block: str
    rows: Callable[[Dims], Iterable[Row]]
    ignored: tuple[str, ...] = ()
    pads_vocab: bool = False
    train_with: str = ""
    layers_per_block: int = 1
    renamed_keys: tuple[tuple[str, str], ...] = ()

    def dims(self, hf_config: Mapping[str, Any], names: Iterable[str]) -> Dims:
        """The sizes that config.json states; KeyError names the entry that is missing.

        Absent entries default as transformers' configuration classes do. Whether the table is tied
        is left out of some files: then an lm_head among `names` decides.
        """
        stated = {
            field: next(hf_config[key] for key in keys if hf_config.get(key) is not None)
            for field, keys in self.hf_keys().items()
            if any(hf_config.get(key) is not None for key in keys)
        }
        for field in ("emb", "mlp", "heads", "layers", "vocab"):
            if field not in stated:
                raise KeyError(self.hf_keys()[field][0])
        derived = {
            "kv_heads": stated["heads"],
            "head_dim": stated["emb"] // stated["heads"],
            "tied": "lm_head.weight" not in names,
        }
        return Dims(**(derived | stated))

    def hf_keys(self) -> dict[str, tuple[str, ...]]:
        """For each field of Dims, the entries of config.json that may state it, best first."""
        return HF_KEYS | {field: (key,) for field, key in self.renamed_keys}

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)


@dataclass(frozen=True)
class Leaf:
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


def bind_rows(
    rows: Iterable[Row], shapes: Mapping[str, Shape], scan_axis: int | None
) -> tuple[list[Leaf], list[str]]:
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
                leaf = Leaf(("params", *path.split("/")), logical, expr, r.dtype)
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
            axis = min(scan_axis or 0, len(named))
            logical = (*named[:axis], r.layers.axis, *named[axis:])
            yield at, logical, {"l": Stacked(numbers, axis), **experts}
