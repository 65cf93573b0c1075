"""Reads a checkpoint back as training would and compares it, bit by bit, with its source.

Both sides are global arrays in the training sharding: the one that Orbax loads and the one that the
engine makes again. They are compared where they live; only counts of differing elements come back.
"""

import gc
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, reduce
from operator import getitem
from typing import Any

import google_crc32c
import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from maxconv import checkpoint
from maxconv.engine import Engine
from maxconv.errors import UserError
from maxconv.inspect import Item, find_items, kvstore, open_item, reason
from maxconv.plan import LeafPlan, Plan
from maxconv.program import bits

Spans = Mapping[str, set[tuple[int, int]]]  # of a file: where values begin and end, in bytes

SMALL_BYTES = 1 << 20  # of a leaf that is always in the sample: norms and biases
SAMPLE_BYTES = 4 << 30  # of the other leaves in the sample, per process
_UNREADABLE = ""  # the key of a problem that spares all others
# The three kinds of OCDBT nodes: manifest, B+tree node, version tree node.
_MAGIC = {bytes.fromhex(magic) for magic in ("0cdb3a2a", "0cdb20de", "0cdb1234")}


@dataclass
class Report:
    """What was found so far, the same on all processes. `total` leaves are to be checked."""

    total: int = 0
    leaves: int = 0
    nbytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(
    directory: epath.PathLike,
    plan: Plan,
    engine: Engine,
    mode: str = "sample",
    window: int = 512 << 20,
    say: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Compares a checkpoint with what the plan makes of its source.

    All processes call it, and get the same report. It holds at most the window and two copies of
    one leaf. What cannot be read is a problem in the report, not an exception.

    Args:
        directory: of the checkpoint: `<out>`, `<out>/0` or `<out>/0/items`.
        plan: of the conversion.
        engine: makes the leaves again. Best made for a plan of `leaves_to_check` alone: it reads
            ahead what its plan has.
        mode: "sample" compares `leaves_to_check` only. "full" compares every leaf, and checks every
            byte of the OCDBT files that no leaf is made of.
        window: the budget, in bytes per process; the engine's is the same one.
        say: called after every leaf.

    Raises:
        UserError: if there is no checkpoint.
    """
    items = find_items(epath.Path(directory))
    if len(items) != 1:
        raise UserError(f"{directory} holds no checkpoint of MaxText; give the one to verify.")
    found = _everyones(_before_reading(items[0], plan, mode))
    report = Report(problems=list(dict.fromkeys(found.values())))
    if _UNREADABLE in found:
        return report
    leaves = [leaf for leaf in leaves_to_check(plan, mode) if leaf.name not in found]
    report.total = len(leaves)
    for group in _groups(leaves, window - window // 4):  # the engine has the rest
        stored, failed = _load(items[0], group)
        failed = _everyones(failed)
        for leaf in group:
            expected = engine.make(leaf)
            if leaf.name in failed:
                report.problems.append(f"{leaf.name} cannot be read: {failed[leaf.name]}.")
            elif sentence := _difference(leaf, expected, stored.pop(leaf.name)):
                report.problems.append(sentence)
            report.leaves += 1
            report.nbytes += leaf.nbytes
            say(report)
    return report


def leaves_to_check(plan: Plan, mode: str) -> list[LeafPlan]:
    """The leaves that a mode compares, in the plan's order.

    A sample has every leaf of at most 1 MiB. Of the others, smallest first, it has those that are
    made by a recipe that the sample lacks, while a process' share of them stays within 4 GiB.
    """
    if mode == "full":
        return list(plan.leaves)
    chosen, recipes, left = set(), set(), SAMPLE_BYTES
    for leaf in sorted(plan.leaves, key=lambda leaf: leaf.nbytes):
        share = leaf.shard_nbytes * plan.mesh.size // len(plan.processes)
        new = {step.recipe for step in leaf.steps} - recipes
        if leaf.nbytes > SMALL_BYTES:
            if not new or share > left:
                continue
            left -= share
        chosen.add(leaf.name)
        recipes |= new
    return [leaf for leaf in plan.leaves if leaf.name in chosen]


def _groups(leaves: Sequence[LeafPlan], window: int) -> Iterator[list[LeafPlan]]:
    """Leaves in order, together as long as they fit the window."""
    group: list[LeafPlan] = []
    for leaf in leaves:
        if group and sum(other.local_nbytes for other in [*group, leaf]) > window:
            yield group
            group = []
        group.append(leaf)
    if group:
        yield group


def _before_reading(directory: epath.Path, plan: Plan, mode: str) -> dict[str, str]:
    """Problems that show without reading leaves, by the leaf or file that they are about."""
    try:
        found = _metadata_problems(open_item(directory), plan)
        if mode == "full" and (directory / "manifest.ocdbt").exists():
            found |= {problem: problem for problem in _file_problems(directory)}
        return found
    except UserError as error:
        return {_UNREADABLE: str(error)}
    except (OSError, ValueError) as error:
        return {_UNREADABLE: f"{directory} cannot be read: {reason(error)}."}


def _metadata_problems(item: Item, plan: Plan) -> dict[str, str]:
    """A sentence for every name that is missing, too many or another array than planned."""
    problems: dict[str, str] = {}
    for leaf in plan.leaves:
        array = item.arrays.get(leaf.name)
        if array is None:
            problems[leaf.name] = f"{leaf.name} is missing."
        elif (array.shape, array.dtype) != (leaf.shape, leaf.dtype.name):
            problems[leaf.name] = (
                f"{leaf.name} is {array.shape} {array.dtype}, planned is {leaf.shape} {leaf.dtype}."
            )
    known = {leaf.name for leaf in plan.leaves} | {"step"}
    for name in [*item.arrays, *item.others]:
        if name not in known and name.partition(".")[0] != "opt_state":
            problems[name] = f"{name} is in the checkpoint, but not in the plan."
    tree, why = _load_tree(item.directory, {"step": 0})
    if why:
        problems["step"] = f"step cannot be read: {why}."
    elif tree["step"] != 0:
        problems["step"] = f"step is {tree['step']}, planned is 0."
    return problems


def _load(
    directory: epath.Path, leaves: Sequence[LeafPlan]
) -> tuple[dict[str, jax.Array], dict[str, str]]:
    """The stored leaves by name; and of those that cannot be read in this process, why."""
    tree, why = _load_tree(directory, {"params": _abstract(leaves)})
    if not why:
        return {leaf.name: reduce(getitem, leaf.leaf.path, tree["params"]) for leaf in leaves}, {}
    if len(leaves) == 1:
        return {}, {leaves[0].name: why}
    stored, failed = {}, {}
    for leaf in leaves:
        arrays, whys = _load(directory, [leaf])
        stored |= arrays
        failed |= whys
    return stored, failed


def _load_tree(directory: epath.Path, abstract: dict[str, Any]) -> tuple[Any, str]:
    """A part of the checkpoint, or why it cannot be read."""
    ctx = checkpoint.context()
    # Each process reads its shards on its own: one that fails must not leave the others waiting.
    ctx.multiprocessing.primary_host = jax.process_index()
    ctx.multiprocessing.active_processes = {jax.process_index()}
    with _unraisable_ignored():
        try:
            with ctx:
                tree = ocp.load(directory.parent, abstract, checkpointable_name=directory.name)
            return tree, ""
        except Exception as error:  # whatever Orbax and TensorStore say of damaged files
            why = reason(error)
        gc.collect()
    return None, why


@contextmanager
def _unraisable_ignored() -> Iterator[None]:
    """When a shard cannot be read, Orbax drops the others unawaited, and Python complains."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def _abstract(leaves: Sequence[LeafPlan]) -> dict[str, Any]:
    arrays = [
        (leaf.leaf.path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding))
        for leaf in leaves
    ]
    return checkpoint.train_state(arrays).params


def _difference(leaf: LeafPlan, expected: jax.Array, stored: jax.Array) -> str | None:
    """A sentence about the first element that is not as it should be, if there is one."""
    count, locate = _comparison(leaf.sharding.mesh)
    rows = np.asarray(count(expected, stored))
    if not rows.any():
        return None
    row = int(np.flatnonzero(rows)[0])
    position, *values = (np.asarray(x) for x in locate(expected, stored, np.int32(row)))
    index = (row, *np.unravel_index(int(position), leaf.shape[1:]))
    should, found = (f"{value.view(leaf.dtype)} (0x{int(value):x})" for value in values)
    return (
        f"{leaf.name}[{', '.join(str(int(i)) for i in index)}] is {found}, the source makes it "
        f"{should}; {rows.sum(dtype=np.int64):,} of {expected.size:,} elements differ."
    )


@cache
def _comparison(mesh: Mesh) -> tuple[Callable[..., jax.Array], Callable[..., list[jax.Array]]]:
    """Two jitted functions of a leaf as it should be and as it is stored.

    The first counts the differing elements in each of its rows, uint32[rows]: a count of them all
    might not fit. The second takes a row as well, and finds the first differing element there: its
    position in the flattened row, and the bits of both.
    """

    def in_bits(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, bits(x.dtype))

    def count(expected: jax.Array, stored: jax.Array) -> jax.Array:
        differ = in_bits(expected) != in_bits(stored)
        return jnp.sum(differ, axis=range(1, differ.ndim), dtype=np.uint32)

    def locate(expected: jax.Array, stored: jax.Array, row: jax.Array) -> list[jax.Array]:
        a, b = (in_bits(x)[row].reshape(-1) for x in (expected, stored))
        position = jnp.argmax(a != b)
        return [position, a[position], b[position]]

    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.jit(count, out_shardings=everywhere), jax.jit(locate, out_shardings=everywhere)


def _everyones(mine: dict[str, str]) -> dict[str, str]:
    """What the processes found, together: the same on all of them."""
    if jax.process_count() == 1:
        return mine
    text = np.frombuffer(json.dumps(mine).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(text.size)).max())
    width = -(-longest // 4096) * 4096  # mostly the same: compiled once
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    theirs = [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]
    return {name: text for found in reversed(theirs) for name, text in found.items()}


def _file_problems(items: epath.Path) -> list[str]:
    """What is wrong with this process' share of the OCDBT files, apart from the leaves in them.

    A data file consists of values, which are the leaves' bytes, and of nodes, which end in their
    CRC. Most nodes are of versions before the last, which no read of the checkpoint comes by.
    """
    values = _value_spans(items)
    databases = [items, *sorted(items.glob("ocdbt.process_*"))]
    files = [d / "manifest.ocdbt" for d in databases]
    files += [file for d in databases for file in sorted(d.glob("d/*"))]
    mine = files[jax.process_index() :: jax.process_count()]
    return [problem for file in mine for problem in _bad_nodes(items, file, values)]


def _value_spans(items: epath.Path) -> Spans:
    """Where in the data files the values lie that the checkpoint's tree points to."""
    store = ts.KvStore.open(kvstore(items)).result()
    (version,) = ts.ocdbt.dump(store).result()["versions"][-1:]
    spans: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    nodes = [version["root"]["location"]]
    while nodes:
        for entry in ts.ocdbt.dump(store, nodes.pop()).result()["entries"]:
            if "location" in entry:
                nodes.append(entry["location"])
            elif "indirect_value" in entry:
                file, start, length = _parsed(entry["indirect_value"])
                spans[file].add((start, start + length))
    return spans


def _parsed(location: str) -> tuple[str, int, int]:
    """File, offset and length of `value:<base>:<file>:<offset>:<length>`."""
    match = re.fullmatch(r"\w+:(.*):(\d+):(\d+)", location)
    assert match is not None, location
    return match[1].replace(":", ""), int(match[2]), int(match[3])


def _bad_nodes(items: epath.Path, file: epath.Path, values: Spans) -> Iterator[str]:
    """A sentence for every run of bytes that are neither a value nor nodes."""
    name, size = str(file.relative_to(items)), file.stat().length
    start = 0
    with file.open("rb") as data:
        for begin, end in [*sorted(values.get(name, ())), (size, size)]:
            while start < begin:
                data.seek(start)
                header = data.read(12)
                length = int.from_bytes(header[4:], "little")
                if header[:4] not in _MAGIC or not 16 <= length <= begin - start:
                    yield f"{name}: bytes {start} to {begin} are damaged, or belong to nothing."
                    break
                node = header + data.read(length - 12)
                if google_crc32c.value(node[:-4]) != int.from_bytes(node[-4:], "little"):
                    yield f"{name}: the node at bytes {start} to {start + length} is damaged."
                start += length
            start = max(start, end)
