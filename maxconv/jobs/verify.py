"""Reads a checkpoint back in its training sharding and compares it, bit by bit, with its source.

Orbax opens it, and leaves are read with TensorStore, as Orbax does; not with `ocp.load`, because
that leaves the other processes waiting if a shard cannot be read. A stored leaf and the one that
the engine makes again are compared on the mesh.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from maxconv.algebra import Box, slices
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.execution.program import bits
from maxconv.jobs.metadata import metadata_problems
from maxconv.jobs.witness import witness
from maxconv.planning.cells import Recipe
from maxconv.planning.placement import local_boxes
from maxconv.planning.plan import LeafPlan, Plan, groups
from maxconv.planning.slabs import Slab
from maxconv.processes.agreement import gathered
from maxconv.sources import Source
from maxconv.sources.ocdbt import unexplained, value_spans
from maxconv.sources.orbax import Item, find_items, open_item, reason
from maxconv.targets import journal, place
from maxconv.targets.repository import is_repository

SMALL_BYTES = 1 << 20  # leaves up to this size, norms and biases, are always in the sample
SAMPLE_BYTES = 1 << 30  # of the other leaves in the sample, per process
_UNREADABLE = ""  # the key of a problem that makes all others redundant


@dataclass
class Report:
    """The result so far, the same on all processes.

    Attributes:
        total: number of leaves to compare with those that the engine makes.
        leaves, nbytes: number of leaves and of bytes that were compared.
        witnessed: bytes of leaves that were compared with those that numpy makes.
        problems: sentences.
    """

    total: int = 0
    leaves: int = 0
    nbytes: int = 0
    witnessed: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    directory: epath.PathLike,
    plan: Plan,
    engine: Engine,
    source: Source,
    mode: str = "sample",
    window: int = 512 << 20,
    say: Callable[[Report], object] = lambda report: None,
    seen_as: Callable[[Item], Item] = lambda item: item,
    custom: Mapping[str, Any] | None = None,
) -> Report:
    """Compares a checkpoint with what the plan makes of its source.

    All processes call it, and get the same report. A process holds at most the window and two
    copies of its part of a slab. Unreadable data is a problem in the report, not an exception.

    Args:
        directory: of the checkpoint: `<out>`, `<out>/0` or `<out>/0/items`.
        plan: of the conversion.
        engine: makes the leaves again; ideally for a plan of just `leaves_to_check`, because it
            reads ahead in its plan.
        source: of the conversion, for `witness`.
        mode: "sample" compares `leaves_to_check` only. "full" compares every leaf, and checks all
            other bytes of the OCDBT files. In both, `witness` then repeats the comparison with
            numpy: for a sample of all leaves, or for all of them.
        window: the budget, in bytes per process; shared with the engine.
        say: called after every slab.
        seen_as: maps the item in the directory to the one to read.
        custom: MaxText's custom metadata, such as `scan_layers`, if known.

    Raises:
        UserError: there is no checkpoint.
    """
    items = find_items(epath.Path(directory))
    if len(items) != 1:
        raise UserError(f"{directory} is not a MaxText checkpoint; give the one to verify.")
    item, found = _open(items[0], plan, mode, custom)
    found = _everyones(found)
    report = Report(problems=list(found.values()))
    if item is None or _UNREADABLE in found:
        return report
    item = seen_as(item)
    leaves = [leaf for leaf in leaves_to_check(plan, mode) if leaf.name not in found]
    report.total = len(leaves)
    made_again = _made_again(item, leaves, engine, window, report, say)
    known = [leaf for leaf in plan.leaves if leaf.name not in found]
    report.witnessed, seen = _witnessed(item, known, source, mode)
    report.problems += filter(None, {**seen, **made_again}.values())
    return report


def _made_again(
    item: Item,
    leaves: Sequence[LeafPlan],
    engine: Engine,
    window: int,
    report: Report,
    say: Callable[[Report], object],
) -> dict[str, str]:
    """Differences from the leaves that the engine makes, by leaf."""
    problems: dict[str, str] = {}
    for group in groups(leaves):  # all of them, as the engine reads ahead in this order
        made = engine.make_slabs([slab for _, slab in group])
        for leaf, slab in group:
            if problem := _compared(item, leaf, slab, made.pop(0), window):
                problems[leaf.name] = problem
            report.nbytes += slab.nbytes
            report.leaves += slab is leaf.slabs[-1]
            say(report)
    return problems


def _witnessed(
    item: Item, leaves: Sequence[LeafPlan], source: Source, mode: str
) -> tuple[int, dict[str, str | None]]:
    """Bytes that were compared with numpy on all processes, and the differences."""
    mine, found = witness(item, leaves, source, mode)
    return sum(gathered(mine.compared)), {**_everyones(found)}


def _compared(
    item: Item, leaf: LeafPlan, slab: Slab, expected: jax.Array, window: int
) -> str | None:
    """A sentence if a stored slab differs or cannot be read."""
    stored, why = _read(item, leaf, slab, window // 2)  # the engine uses the rest
    if failed := _everyones({leaf.name: why} if why else {}):
        return f"{leaf.name} cannot be read: {failed[leaf.name]}."
    return _difference(leaf, slab, expected, stored) if stored is not None else None


def leaves_to_check(plan: Plan, mode: str) -> list[LeafPlan]:
    """The leaves that a mode compares, in the plan's order.

    A sample has every leaf of at most 1 MiB. From the others, smallest first, it takes slabs that
    add a new recipe to the sample, up to 1 GiB per process.
    """
    if mode == "full":
        return list(plan.leaves)
    chosen: dict[str, list[Slab]] = {}
    recipes, left = set[Recipe](), SAMPLE_BYTES
    for leaf in sorted(plan.leaves, key=lambda leaf: leaf.nbytes):
        for slab in leaf.slabs:
            new = {step.recipe for step in slab.steps} - recipes
            if leaf.nbytes > SMALL_BYTES:
                if not new or slab.local_nbytes > left:
                    continue
                left -= slab.local_nbytes
            chosen.setdefault(leaf.name, []).append(slab)
            recipes |= new
    return [replace(p, slabs=tuple(chosen[p.name])) for p in plan.leaves if p.name in chosen]


def _open(
    directory: epath.Path, plan: Plan, mode: str, custom: Mapping[str, Any] | None
) -> tuple[Item | None, dict[str, str]]:
    """Opens the checkpoint; also returns problems found before reading leaves, by leaf or file."""
    try:
        item = open_item(directory)
        found = metadata_problems(item, plan, custom)
        if mode == "full" and item.ocdbt:
            found |= _file_problems(directory)
        return item, found
    except UserError as error:
        return None, {_UNREADABLE: str(error)}
    except (OSError, ValueError) as error:
        return None, {_UNREADABLE: f"{directory} cannot be read: {reason(error)}."}


def _read(item: Item, leaf: LeafPlan, slab: Slab, window: int) -> tuple[jax.Array | None, str]:
    """A stored slab, or why this process cannot read it; `window` bounds the bytes in flight."""
    boxes = local_boxes(slab.sharding, slab.shape)
    distinct = list(set(boxes.values()))
    at_once = max(1, window // (2 * slab.shard_nbytes))  # what is read is copied once
    host: dict[Box, np.ndarray] = {}
    try:
        for i in range(0, len(distinct), at_once):
            batch = {box: slab.in_leaf(box) for box in distinct[i : i + at_once]}
            store = item.open(leaf.name, [*batch.values()]).result()
            reads = {box: store[slices(there)].read() for box, there in batch.items()}
            host |= {box: read.result() for box, read in reads.items()}
    except (ValueError, OSError) as error:
        return None, reason(error)
    shards = [jax.device_put(host[box], device) for device, box in boxes.items()]
    return jax.make_array_from_single_device_arrays(slab.shape, slab.sharding, shards), ""


def _difference(leaf: LeafPlan, slab: Slab, expected: jax.Array, stored: jax.Array) -> str | None:
    """A sentence about the first element that differs, if any."""
    differ, locate = _comparison(leaf.sharding.mesh)
    rows = np.flatnonzero(differ(expected, stored))
    if not rows.size:
        return None
    found = locate(expected, stored, np.int32(rows[0]))
    counts, position, *values = (np.asarray(x) for x in found)
    index = (rows[0], *np.unravel_index(int(position), slab.shape[1:]))
    in_leaf = slab.in_leaf(tuple((int(i), int(i) + 1) for i in index))
    should, got = (f"{value.view(leaf.dtype)} (0x{int(value):x})" for value in values)
    return (
        f"{leaf.name}[{', '.join(str(at) for at, _ in in_leaf)}] is {got}, but should be {should} "
        f"according to the source; {counts.sum(dtype=np.int64):,} of {expected.size:,} elements "
        "differ."
    )


@cache
def _comparison(mesh: Mesh) -> tuple[Callable[..., jax.Array], Callable[..., list[jax.Array]]]:
    """Two jitted functions of a leaf as expected and as stored.

    The first returns whether each row differs, bool[rows]; an intact leaf needs only that. The
    second is given a row that differs. It returns the number of differing elements in each row,
    uint32[rows], the position of the first one in the flattened row, and the bits of both.
    """

    def in_bits(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, bits(x.dtype))

    def differ(expected: jax.Array, stored: jax.Array) -> jax.Array:
        return jnp.any(in_bits(expected) != in_bits(stored), axis=range(1, expected.ndim))

    def locate(expected: jax.Array, stored: jax.Array, row: jax.Array) -> list[jax.Array]:
        unequal = in_bits(expected) != in_bits(stored)
        counts = jnp.sum(unequal, axis=range(1, expected.ndim), dtype=np.uint32)
        a, b = (in_bits(x)[row].reshape(-1) for x in (expected, stored))
        position = jnp.argmax(a != b)
        return [counts, position, a[position], b[position]]

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(differ, out_shardings=everywhere), jax.jit(locate, out_shardings=everywhere)


def _everyones(mine: dict[str, str]) -> dict[str, str]:
    """The findings of all processes, merged; the same on all of them."""
    return {name: why for found in reversed(gathered(mine)) for name, why in found.items()}


def _file_problems(items: epath.Path) -> dict[str, str]:
    """Damage in this process' share of the OCDBT files, apart from the leaves in them.

    A data file consists of values, which are the bytes of leaves, and of nodes, which end in a CRC.
    Most nodes belong to earlier versions, which reading the checkpoint does not touch. Some values
    are only in the tree of their own store: those of a leaf that was made twice, if the merged tree
    has the one of an earlier attempt. Stores of interrupted attempts (journal.ATTEMPT in their
    names) may also end in incomplete values or nodes, so they are not checked here: comparing the
    leaves is enough.
    """
    values = dict(value_spans(items))
    stores = sorted(items.glob("ocdbt.process_*"))
    databases = [items, *(store for store in stores if journal.ATTEMPT not in store.name)]
    for store in databases[1:]:
        with suppress(ValueError):  # it is empty, or its damaged nodes are reported below
            for file, spans in value_spans(store).items():
                name = f"{store.name}/{file}"
                values[name] = values.get(name, set()) | spans
    files = [d / "manifest.ocdbt" for d in databases]
    files += [file for d in databases for file in sorted(d.glob("d/*"))]
    found = {}
    for file in files[jax.process_index() :: jax.process_count()]:
        name = str(file.relative_to(items))
        if bad := [*unexplained(file, sorted(values.get(name, ())))]:
            found[name] = f"{name} is damaged: {', '.join(bad)}."
    return found


def saved_items(path: str) -> epath.Path:
    """The tree of the MaxText checkpoint at `<out>`, `<out>/0` or `<out>/0/items`.

    Raises:
        UserError: there is none, or it is on the Hub.
    """
    if is_repository(path):
        raise UserError(
            f"{path} is on the Hub; download it first: "
            f"`hf download {path.removeprefix('hf://')} --local-dir DIR`, then "
            "`maxconv verify DIR`."
        )
    root = epath.Path(path if "://" in path else os.path.abspath(path))  # as Orbax requires
    items = find_items(root / place.STEP) or find_items(root)
    if len(items) != 1:
        raise UserError(f"{path} is not a MaxText checkpoint: it has no 0/items/_METADATA.")
    return items[0]
