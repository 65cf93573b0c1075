"""Saves with Orbax' public API only, for releases of Orbax that were not tested.

On disks `ocp.partial` saves groups of leaves one after another and merges them at the end. This
gives the same bits and metadata as a streaming save, but it waits for each group, holds the largest
leaf whole, and cannot be resumed. `ocp.partial` does not support buckets: there all leaves are made
first, and saved as MaxText does. tests/benchmarks/partial_save.py measures both.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from maxconv.algebra import slices
from maxconv.processes import liveness
from maxconv.processes.agreement import once
from maxconv.targets import place
from maxconv.targets.base import Progress
from maxconv.targets.lazy import LazyTensor
from maxconv.targets.orbax import TrainState, end_together

_MERGED = f"{place.UNFINISHED}.merged"  # where pieces are merged; not a checkpoint yet
_KEY, _ITEMS = "state", "items"  # names of the tree in `ocp.partial` and in MaxText
_METADATA = "_CHECKPOINT_METADATA"
_INDICATOR = "orbax.checkpoint"  # marks a layout without `items`

Leaf = tuple[tuple[str, ...], Any]


@jax.tree_util.register_dataclass
@dataclass
class _Parameters:
    """A part of a TrainState with the same keys; no key may be saved twice."""

    params: dict[str, Any]


def save(
    directory: str,
    state: TrainState,
    window: int,
    progress: Progress,
    ctx: ocp.Context,
    kept: Mapping[str, Any],
    custom_metadata: Mapping[str, Any],
    ready: Callable[[], None],
) -> None:
    """See `maxconv.targets.orbax.save`; `window` limits a group of several leaves."""
    assert not kept, "ocp.partial cannot merge the stores of an earlier attempt"
    progress.begun.set()
    with liveness.all_or_none():
        if "://" in directory:
            _save_at_once(directory, state, progress, ctx, custom_metadata, ready)
        else:
            _save_in_groups(
                epath.Path(directory), state, window, progress, ctx, custom_metadata, ready
            )


def _save_at_once(
    directory: str,
    state: TrainState,
    progress: Progress,
    ctx: ocp.Context,
    custom_metadata: Mapping[str, Any],
    ready: Callable[[], None],
) -> None:
    made = jax.tree.map(lambda leaf: _made(leaf, progress, ready), state)
    with ocp.training.Checkpointer(directory, context=ctx) as checkpointer:
        end_together(checkpointer)
        checkpointer.save_checkpointables(
            0, {_ITEMS: made}, force=True, custom_metadata=dict(custom_metadata)
        )
    for leaf in jax.tree.leaves(state):
        _written(leaf, progress)


def _save_in_groups(
    root: epath.Path,
    state: TrainState,
    window: int,
    progress: Progress,
    ctx: ocp.Context,
    custom_metadata: Mapping[str, Any],
    ready: Callable[[], None],
) -> None:
    root.mkdir(parents=True, exist_ok=True)
    merged = root / _MERGED
    with ctx:
        for number, group in enumerate(_groups(_leaves(state.params), window)):
            params = _nested((path, _made(leaf, progress, ready)) for path, leaf in group)
            piece = _Parameters(params) if number else replace(state, params=params)
            ocp.partial.save(merged, piece, custom_metadata=dict(custom_metadata))
            del params, piece
            for _, leaf in group:
                _written(leaf, progress)
        ocp.partial.finalize(merged)
    once(lambda: _publish(merged, root / place.STEP))


def _publish(merged: epath.Path, step: epath.Path) -> None:
    """Renames a merged checkpoint to MaxText's layout; only the last rename makes it visible."""
    (merged / _KEY).rename(merged / _ITEMS)
    (merged / _INDICATOR).unlink()
    metadata = json.loads((merged / _METADATA).read_text())
    handler = ocp.handlers.PyTreeHandler  # `ocp.partial` records one that cannot load
    metadata["item_handlers"] = {_ITEMS: f"{handler.__module__}.{handler.__qualname__}"}
    (merged / _METADATA).write_text(json.dumps(metadata))
    merged.rename(step)


def _leaves(params: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[Leaf]:
    for name, node in params.items():
        if isinstance(node, dict):
            yield from _leaves(node, (*path, name))
        else:
            yield (*path, name), node


def _nested(leaves: Iterable[Leaf]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for (*above, name), leaf in leaves:
        node = params
        for each in above:
            node = node.setdefault(each, {})
        node[name] = leaf
    return params


def _groups(leaves: Iterable[Leaf], window: int) -> Iterator[Sequence[Leaf]]:
    """Groups of leaves in order, as many as fit in the window, but at least one."""
    group, held = list[Leaf](), 0
    for path, leaf in leaves:
        if group and held + _nbytes(leaf) > window:
            yield group
            group, held = [], 0
        group.append((path, leaf))
        held += _nbytes(leaf)
    if group:
        yield group


def _nbytes(leaf: Any) -> int:
    return leaf.local_nbytes if isinstance(leaf, LazyTensor) else 0


def _made(leaf: Any, progress: Progress, ready: Callable[[], None]) -> Any:
    progress.hold(_nbytes(leaf))
    return _whole(leaf, ready) if isinstance(leaf, LazyTensor) else leaf


def _written(leaf: Any, progress: Progress) -> None:
    progress.hold(-_nbytes(leaf))
    progress.written += _nbytes(leaf)
    progress.leaves += isinstance(leaf, LazyTensor)


def _whole(leaf: LazyTensor, ready: Callable[[], None]) -> jax.Array:
    """Loads all parts of a leaf and assembles them in host memory, shard by shard."""
    if len(leaf.parts) == 1:
        ((_, part),) = leaf.parts
        ready()
        return part.load()
    where = leaf.sharding.addressable_devices_indices_map(leaf.shape)
    shape = leaf.sharding.shard_shape(leaf.shape)
    shards = {device: np.empty(shape, leaf.dtype) for device in where}
    for in_whole, part in leaf.parts:
        ready()
        for shard in part.load().addressable_shards:
            pairs = zip(shard.index, part.shape, strict=True)
            box = in_whole(tuple(s.indices(n)[:2] for s, n in pairs))
            starts = [s.start or 0 for s in where[shard.device] or ()]
            inner = tuple((lo - at, hi - at) for (lo, hi), at in zip(box, starts, strict=True))
            shards[shard.device][slices(inner)] = np.asarray(shard.data)
    arrays = [jax.device_put(shard, device) for device, shard in shards.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)
