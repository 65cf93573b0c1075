"""The way back: which tensors of Hugging Face the parameters of MaxText are, and how they are made.

The rules are the family's table, inverted. Names, shapes and dtypes are those of a checkpoint of
Hugging Face: the model as it was published, or the one that was converted.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxconv.algebra import AlgebraError, Expr, Shape, Tensor, invert, substitute, tensors
from maxconv.algebra.together import Stack, stacks
from maxconv.errors import UserError
from maxconv.families import Parameter, Row, paths
from maxconv.models.codecs import decoded
from maxconv.models.parameters import parameters
from maxconv.models.resolve import resolve
from maxconv.models.stored_names import HEAD
from maxconv.sources import Source, TensorInfo
from maxconv.sources.safetensors import some
from maxconv.sources.trees import TreeSource

ROOT = "params.params."  # before the names of MaxText's tree
_QUANTISED = "quantization_config"
_HEAD = "decoder.logits_dense.kernel"
_TABLE = "token_embedder.embedding"


@dataclass(frozen=True)
class WayBack:
    """What an export consists of.

    Attributes:
        rules: each tensor, over the leaves of the tree.
        stacks: the same, over the leaves of the tree, together where they are read together.
        dtypes: of each tensor as published.
        keeps_fp8: whether fp8 weights stay as they are, with their scales.
        copied: published tensors that the tree has nothing for: encoders that were not trained,
            layers for multi-token prediction. They are taken as they are.
        left_out: those that cannot be: of a tied head, or quantised.
        scan_axis: along which layers are stacked in the tree; None if they are not.
        notices: sentences for the user.
    """

    rules: Mapping[str, Expr]
    stacks: tuple[Stack, ...]
    dtypes: Mapping[str, np.dtype]
    keeps_fp8: bool
    copied: tuple[str, ...]
    left_out: tuple[str, ...]
    scan_axis: int | None
    notices: tuple[str, ...]


class Unquantised(Source):
    """A checkpoint of Hugging Face as it would be without quantisation; it cannot be read."""

    def __init__(self, of: Source):
        super().__init__()
        self.root, self.revision, self.notices = of.root, of.revision, of.notices
        self.config = {key: value for key, value in of.config.items() if key != _QUANTISED}
        stored = {name: Tensor(name, info.shape) for name, info in of.tensors.items()}
        dtypes = {name: info.dtype for name, info in of.tensors.items()}
        weights, self.codecs = decoded(stored, of.config, False, dtypes)
        self.tensors = {name: _info(of, name, weight) for name, weight in weights.items()}

    def read(self, info: TensorInfo, parts: Sequence[Any]) -> None:
        raise OSError(f"{self.root} is used for its names; {info.name} is not read")

    def close(self) -> None:
        pass


def _info(source: Source, name: str, weight: Expr) -> TensorInfo:
    if isinstance(weight, Tensor):
        return source.tensors[weight.name]
    return TensorInfo(name, np.dtype("bfloat16"), weight.shape)


def way_back(
    tree: TreeSource,
    published: Source,
    name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
    scan_axis: int = 1,
) -> WayBack:
    """How the parameters of a tree become the tensors of a checkpoint.

    Args:
        tree: the checkpoint of MaxText.
        published: a checkpoint of Hugging Face with the names and shapes to write.
        name, facts, sizes: MaxText's model_name, its configuration, and sizes given as arguments,
            see `resolve`.
        scan_axis: MaxText's param_scan_axis, if layers are stacked.

    Raises:
        UserError: with every leaf that is missing, unexpected, or of another shape.
    """
    keeps_fp8 = any(info.dtype.name.startswith("float8") for info in tree.tensors.values())
    plain = published if keeps_fp8 else Unquantised(published)
    shapes = {name: info.shape for name, info in tree.tensors.items()}
    wanted = {**sizes_shown(shapes), **(sizes or {})}
    model = resolve(plain, name, facts, wanted, keeps_fp8, head_differs=_HEAD in tree.tensors)
    axis = scan_axis if is_scanned(shapes, model.rows) else None
    bound = parameters(model, published.root, axis)
    bound, notices = _checked(tree, bound)
    rules = {p.name.removeprefix(ROOT): substitute(p.expr, model.tensors) for p in bound}
    try:
        back = invert(rules)
    except AlgebraError as error:
        lines = str(error).splitlines()
        raise UserError([f"{published.root}: {line}." for line in lines]) from None
    stored = {next(tensors(weight)).name: name for name, weight in model.tensors.items()}
    left = sorted(plain.tensors.keys() - back.keys())
    as_stored = {n for n in left if n in published.tensors} if not _codecs(plain) else set()
    copied = tuple(n for n in left if n in as_stored and stored.get(n, n) != HEAD)
    left_out = tuple(sorted({*left} - {*copied}))
    dtypes = {tensor: plain.tensors[tensor].dtype for tensor in back}
    if _codecs(plain):
        notices.append("weights are written in bfloat16, not quantised as they were published")
    told = (*plain.notices, *notices)
    return WayBack(
        back, tuple(_stacks(back, dtypes)), dtypes, keeps_fp8, copied, left_out, axis, told
    )


def _codecs(source: Source) -> bool:
    """Whether a checkpoint was quantised, and is taken as it would be without."""
    return isinstance(source, Unquantised) and bool(source.codecs)


def _stacks(back: Mapping[str, Expr], dtypes: Mapping[str, np.dtype]) -> Iterator[Stack]:
    """The tensors that are made together; all of a stack have one dtype."""
    by_dtype: dict[np.dtype, dict[str, Expr]] = {}
    for name, expr in back.items():
        by_dtype.setdefault(dtypes[name], {})[name] = expr
    for rules in by_dtype.values():
        yield from stacks(rules)


def sizes_shown(shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The sizes that a tree shows: of its vocabulary, and which parts of a model it has.

    `shapes`: of its leaves, by name.
    """
    roots = {name.partition(".")[0] for name in shapes}
    predicted = {name.split(".")[1] for name in shapes if name.startswith("mtp_block.")}
    found: dict[str, Any] = {
        "use_multimodal": "vision_encoder" in roots,
        "use_audio": "audio_encoder" in roots,
        "mtp_num_layers": len({layer for layer in predicted if layer[-1:].isdigit()}),
    }
    if _TABLE in shapes:
        found["vocab_size"] = shapes[_TABLE][0]
    return found


def is_scanned(names: Iterable[str], rows: Iterable[Row]) -> bool:
    """Whether the layers of a tree are stacked: which of the two sets of names it has."""
    rows, names = list(rows), {*names}
    scanned, unscanned = (
        {path.replace("/", ".") for path in paths(rows, axis)} for axis in (1, None)
    )
    return len(scanned & names) > len(unscanned & names)


def _checked(tree: TreeSource, bound: Iterable[Parameter]) -> tuple[list[Parameter], list[str]]:
    """The parameters that tensors are made of, and notices about the others.

    Raises:
        UserError: the tree has others, or of other shapes.
    """
    wanted = {p.name.removeprefix(ROOT): p for p in bound}
    missing = sorted(
        name for name, p in wanted.items() if name not in tree.tensors and any(tensors(p.expr))
    )
    problems = [f"{tree.root} lacks {some(missing)}."] * bool(missing)
    if more := sorted(tree.tensors.keys() - wanted.keys()):
        problems.append(f"{tree.root} has {some(more)}, which this model has not.")
    for name, parameter in wanted.items():
        shape = tree.tensors[name].shape if name in tree.tensors else parameter.shape
        if shape != parameter.shape:
            problems.append(
                f"{name} in {tree.root} has shape {shape}, but should have {parameter.shape}."
            )
    if problems:
        raise UserError(problems)
    constants = sorted(name for name, p in wanted.items() if not any(tensors(p.expr)))
    notices = [f"left out, as Hugging Face has no such tensors: {some(constants)}"]
    kept = [p for p in wanted.values() if any(tensors(p.expr))]
    return kept, notices * bool(constants)
