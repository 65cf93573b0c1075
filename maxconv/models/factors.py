"""LoRA factors that MaxText trained, and the kernels that they are added to on the way back.

They lie beside their kernel: `kernel_lora_a`, (inputs, rank), and `kernel_lora_b`, (rank, outputs).
Those of several layers are stacked as kernels are, or along the first axis: to_huggingface of
MaxText knows both. See `adapters.py` for what a row does to them.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from maxconv.algebra import (
    AlgebraError,
    Combine,
    Expr,
    Shape,
    Tensor,
    apply,
    rearrange,
    scale,
)
from maxconv.errors import UserError
from maxconv.families import Row
from maxconv.families.table import Numbers
from maxconv.models.adapters import IN, OUT, Adaptable
from maxconv.sources import Source
from maxconv.sources.safetensors import some
from maxconv.sources.trees import Tree, factors

Found = Mapping[str, Mapping[str, str]]


def scaling_of(tree: Tree, said: Mapping[str, float | None]) -> tuple[int, float]:
    """MaxText's rank and alpha of an adapter, by which its products are scaled: alpha / rank.

    Args:
        tree: with the factors; MaxText notes both beside them.
        said: "lora_rank" and "lora_alpha" as arguments.

    Raises:
        UserError: they are not known, or are said in two ways.
    """
    noted, pairs = tree.custom.get("lora") or {}, factors(tree.tensors).values()
    ranks = {tree.tensors[pair[IN]].shape[-1] for pair in pairs if IN in pair}
    known: dict[str, set[float]] = {"lora_rank": {*ranks}, "lora_alpha": set()}
    problems: list[str] = []
    for key, values in known.items():
        values |= {value for value in (noted.get(key), said.get(key)) if value}
        if len(values) > 1:
            have = " and ".join(f"{value:g}" for value in sorted(values))
            problems.append(f"{key} is {have} in {tree.root} or the arguments; give one.")
        elif not values:
            problems.append(f"{tree.root} does not say {key}; add lora.{key}=.")
    if problems:
        raise UserError(problems)
    return int(known["lora_rank"].pop()), known["lora_alpha"].pop()


@dataclass(frozen=True)
class Kernel:
    """A kernel that can have factors.

    Attributes:
        at: its path in the tree, without `.kernel`.
        of: its row, and which of its axes are inputs and outputs.
        numbers: of the layers that are stacked in it.
    """

    at: str
    of: Adaptable
    numbers: Numbers


def kernels(rows: Iterable[Row], scans: bool) -> Iterator[Kernel]:
    for adaptable in filter(None, map(Adaptable.of, rows)):
        row = adaptable.row
        places: Sequence[tuple[str, Numbers]] = (("", 0),)
        if row.layers is not None:
            places = row.layers.scanned if scans else row.layers.unscanned
        for path, numbers in places:
            at = row.path.format(layers=path).removesuffix("/kernel").replace("/", ".")
            yield Kernel(at, adaptable, numbers)


def adapted(tree: Source, rows: Iterable[Row], scans: bool) -> tuple[list[Kernel], Found]:
    """The kernels that have factors, and the factors.

    Raises:
        UserError: one is missing, or is of what cannot be adapted.
    """
    found = factors(tree.tensors)
    having = [kernel for kernel in kernels(rows, scans) if kernel.at in found]
    problems = [
        f"{tree.root} has only one of the two factors of {at}; save it again."
        for at, pair in found.items()
        if len(pair) < 2
    ]
    if others := sorted(found.keys() - {kernel.at for kernel in having}):
        problems.append(
            f"{tree.root} has factors of {some(others)}, which are no kernels of this model that "
            "an adapter can be of."
        )
    if problems:
        raise UserError(problems)
    return having, found


def merged_kernels(
    tree: Source, rows: Iterable[Row], scan_axis: int | None, scaling: float
) -> dict[str, Expr]:
    """Each kernel that has factors, plus `scaling` times their product, in float32.

    Raises:
        UserError: with every factor that does not fit its kernel.
    """
    having, found = adapted(tree, rows, scan_axis is not None)
    merged: dict[str, Expr] = {}
    problems: list[str] = []
    for kernel in having:
        name = next((n for n in (f"{kernel.at}.kernel", kernel.at) if n in tree.tensors), None)
        if name is None:
            problems.append(f"{tree.root} has factors of {kernel.at}, but not the kernel.")
            continue
        try:
            merged[name] = _sum(tree, name, kernel, found[kernel.at], scan_axis or 0, scaling)
        except AlgebraError as error:
            problems.append(f"{tree.root}: {error}.")
    if problems:
        raise UserError(problems)
    return merged


def _sum(
    tree: Source, name: str, kernel: Kernel, pair: Mapping[str, str], axis: int, scaling: float
) -> Expr:
    row, shape = kernel.of.row, tree.tensors[name].shape
    layers = [f"l{i}" for i in range(len(_lengths(kernel.numbers)))]
    experts = ["x"] if row.experts else []
    own = [f"{side}{i}" for i, side in enumerate(kernel.of.sides)]
    names = _stacked(layers, [*experts, *own], axis if row.stack is None else row.stack)
    if len(names) != len(shape):
        raise AlgebraError(f"{name} has shape {shape}, but should have {len(names)} axes")
    sizes = dict(zip(names, shape, strict=True))
    first = [*layers, *experts]
    rank = tree.tensors[pair[IN]].shape[-1:]
    parts: list[Expr] = []
    for side, flat_axes in ((IN, ["flat", "rank"]), (OUT, ["rank", "flat"])):
        width = math.prod(n for axis_name, n in sizes.items() if axis_name.startswith(side))
        known = {**sizes, "flat": width, "rank": math.prod(rank)}
        info = tree.tensors[pair[side]]
        orders = [_stacked(layers, [*experts, *flat_axes], at) for at in (axis, 0)]
        order = next((o for o in orders if tuple(known[n] for n in o) == info.shape), None)
        if order is None:
            wanted = tuple(known[n] for n in orders[0])
            raise AlgebraError(f"{info.name} has shape {info.shape}, but should have {wanted}")
        to = rearrange(f"{' '.join(order)} -> {' '.join([*first, *flat_axes])}")
        parts.append(apply(to, Tensor(info.name, info.shape)))
    product = apply(scale(scaling), Combine("matmul", (parts[0], parts[1])))
    grouped = " ".join(f"({' '.join(n for n in own if n.startswith(side))})" for side in (IN, OUT))
    to = rearrange(f"{' '.join(first)} {grouped} -> {' '.join(names)}", **sizes)
    return Combine("plus", (Tensor(name, shape), apply(to, product)))


def _lengths(numbers: Numbers) -> Shape:
    return () if isinstance(numbers, int) else (len(numbers), *_lengths(numbers[0]))


def _stacked(layers: Sequence[str], axes: Sequence[str], at: int) -> list[str]:
    return [*axes[:at], *layers, *axes[at:]]
