"""What a family is: rows that say where each leaf comes from, and how rows become leaves.

A row's path may hold `{layers}` and its names `{l}`: such a row stands for every layer. Scanned, it
is one leaf with a stacked axis, `decoder/layers/...`; unscanned, one leaf a layer,
`decoder/layers_0/...`. Nothing else in a family knows the difference.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from maxconv.algebra import AlgebraError, Expr, Shape, Stacked, bind, free_indices


@dataclass(frozen=True)
class Dims:
    """The sizes of a decoder, in MaxText's terms.

    `vocab` is MaxText's, which may be padded. `layers` may be fewer than the checkpoint has.
    `tied`: logits come from the embedding table.
    """

    emb: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int
    tied: bool


@dataclass(frozen=True)
class Row:
    """One parameter: its path in MaxText's tree, its logical axes, and its template."""

    path: str
    logical: tuple[str, ...]
    expr: Expr


def row(path: str, logical: str, expr: Expr) -> Row:
    """A row; `logical` names the axes, separated by spaces, without that of stacked layers."""
    return Row(path, tuple(logical.split()), expr)


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
    """

    architectures: tuple[str, ...]
    decoder_block: str
    rows: Callable[[Dims], Iterable[Row]]
    ignored: tuple[str, ...] = ()
    pads_vocab: bool = False
    train_with: str = ""

    def dims(self, hf_config: Mapping[str, Any], names: Iterable[str]) -> Dims:
        """The sizes that config.json states; KeyError names the entry that is missing.

        Absent entries default as transformers' configuration classes do. Whether the table is tied
        is left out of some files: then an lm_head among `names` decides.
        """
        heads = hf_config["num_attention_heads"]
        tied = hf_config.get("tie_word_embeddings")
        return Dims(
            emb=hf_config["hidden_size"],
            mlp=hf_config["intermediate_size"],
            heads=heads,
            kv_heads=hf_config.get("num_key_value_heads") or heads,
            head_dim=hf_config.get("head_dim") or hf_config["hidden_size"] // heads,
            layers=hf_config["num_hidden_layers"],
            vocab=hf_config["vocab_size"],
            tied="lm_head.weight" not in names if tied is None else tied,
        )

    def ignores(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.ignored)


@dataclass(frozen=True)
class Leaf:
    """A parameter of MaxText's tree: path below `params`, logical axes, bound expression."""

    path: tuple[str, ...]
    logical: tuple[str, ...]
    expr: Expr

    @property
    def name(self) -> str:
        """As Orbax names it in a MaxText checkpoint: `params.params.decoder...`."""
        return ".".join(("params", *self.path))

    @property
    def shape(self) -> Shape:
        return self.expr.shape


def bind_rows(
    rows: Iterable[Row], shapes: Mapping[str, Shape], layers: int, scan_axis: int | None
) -> tuple[list[Leaf], list[str]]:
    """Every leaf, in the order of MaxText's tree, and a sentence for each row that does not fit.

    Args:
        rows: a family's table.
        shapes: shape of each tensor of the checkpoint.
        layers: how many layers to take, from the first.
        scan_axis: MaxText's param_scan_axis, or None for unscanned layers.
    """
    leaves, problems = [], []
    for r in rows:
        for path, logical, indices in _instances(r, layers, scan_axis):
            try:
                leaf = Leaf(("params", *path.split("/")), logical, bind(r.expr, shapes, indices))
                if len(leaf.shape) != len(logical):
                    raise AlgebraError(f"{leaf.shape} has not the axes {logical}")
                leaves.append(leaf)
            except AlgebraError as error:
                problems.append(f"{path}: {error}")
    return sorted(leaves, key=lambda leaf: leaf.path), problems


def _instances(
    r: Row, layers: int, scan_axis: int | None
) -> Iterator[tuple[str, tuple[str, ...], dict[str, int | Stacked]]]:
    """The path, logical axes and indices of each leaf that a row stands for."""
    if "l" not in free_indices(r.expr):
        yield r.path, r.logical, {}
    elif scan_axis is None:
        for i in range(layers):
            yield r.path.format(layers=f"layers_{i}"), r.logical, {"l": i}
    else:
        axis = min(scan_axis, len(r.logical))
        logical = (*r.logical[:axis], "layers", *r.logical[axis:])
        yield r.path.format(layers="layers"), logical, {"l": Stacked(tuple(range(layers)), axis)}
