"""MaxText's checkpoint format, and the choice between two ways to save it with Orbax."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from maxconv import private
from maxconv.processes import liveness
from maxconv.targets.base import Progress

FILE_BYTES = 2 << 30  # MaxText's target size of a data file, and the largest chunk
TIMEOUT_SECONDS = 7 * 24 * 3600  # the whole conversion happens inside one save


def context(
    use_ocdbt: bool = True,
    use_zarr3: bool = True,
    compression: bool = False,
    file_bytes: int = FILE_BYTES,
) -> ocp.Context:
    """The Orbax context of MaxText 0.2.5's checkpoint manager (common/checkpoint_context.py).

    Args:
        use_ocdbt, use_zarr3, compression: the storage format.
        file_bytes: target size of an OCDBT data file. Files that reach it are written concurrently;
            smaller ones are written one after another.
    """
    ctx = ocp.Context()
    ctx.array.saving.use_ocdbt = use_ocdbt
    ctx.array.saving.use_zarr3 = use_zarr3
    ctx.array.saving.use_compression = compression
    ctx.array.saving.ocdbt_target_data_file_size = file_bytes
    ctx.array.saving.storage_options.chunk_byte_size = FILE_BYTES
    ctx.asynchronous.timeout_secs = TIMEOUT_SECONDS
    ctx.pytree.loading.partial_load = True
    return ctx


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """What MaxText saves, in its order: the arrays of flax.training.train_state.TrainState."""

    step: int
    params: dict[str, Any]
    opt_state: dict[str, Any]


def train_state(leaves: Mapping[str, Any]) -> TrainState:
    """The state before the first step, without optimizer state.

    `leaves`: parameters by name, such as `params.params.decoder...`.
    """
    params: dict[str, Any] = {}
    for name, leaf in leaves.items():
        _, *path = name.split(".")
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return TrainState(0, params, {})


def whole_state(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A training state as MaxText's trainer saves it (common/train_state_nnx.py).

    `leaves`: by name, such as `opt_state.0.mu.params.decoder...`; a number is a place in a list.
    Where the state has no array, they are None or an empty container.
    """
    state: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = state
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return {key: _with_lists(node) for key, node in state.items()}


def _with_lists(node: Any) -> Any:
    """A tree with lists for dictionaries of numbers; None where there is nothing."""
    if not isinstance(node, dict):
        return node
    found = {key: _with_lists(inner) for key, inner in node.items()}
    if not found or not all(map(is_place, found)):
        return found
    return [found.get(str(i)) for i in range(max(map(int, found)) + 1)]


def order(name: str) -> list[tuple[int, str]]:
    """A key that sorts the leaves of a state by name as JAX does, and so as Orbax saves them."""
    return [(int(key), "") if is_place(key) else (0, key) for key in name.split(".")]


def is_place(key: str) -> bool:
    """Whether a part of a name is the number of a place in a list."""
    return key.isdecimal()


def save(
    directory: str,
    state: TrainState | dict[str, Any],
    scan_layers: bool,
    window: int,
    progress: Progress,
    ctx: ocp.Context | None = None,
    kept: Mapping[str, Any] = MappingProxyType({}),
    metadata: Mapping[str, Any] = MappingProxyType({}),
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Saves a state, which may have lazy leaves, as step 0: `<directory>/0/items`.

    Returns when everything is durable; until then nothing there loads as a checkpoint.

    Args:
        directory: of the checkpoint.
        state: to save, of `train_state` or `whole_state`.
        scan_layers: recorded for MaxText.
        window: maximum bytes per process that wait to be written.
        progress: is updated.
        ctx: Orbax context; by default MaxText's.
        kept: leaves that an earlier attempt wrote, from `journal.finished`; they are not made.
        metadata: more metadata for MaxText.
        ready: called before each part is made.
    """
    if streams():
        from maxconv.targets.streaming import save as chosen
    else:
        from maxconv.targets.partial_save import save as chosen
    custom = {"scan_layers": scan_layers, **metadata}
    chosen: Any
    chosen(directory, state, window, progress, ctx or context(), kept, custom, ready)


def end_together(checkpointer: ocp.training.Checkpointer) -> None:
    """Makes an error of a commit end all processes, in the thread where it happens.

    Orbax' thread would wait at a barrier before it passes the error on, for processes that wait
    for this one to commit. A release that has these steps under other names is left as it is.
    """
    manager: Any = getattr(checkpointer, "_manager", None)
    for step in ("_wait_for_checkpointers", "_finalize_checkpoint"):
        if (function := getattr(manager, step, None)) is not None:
            setattr(manager, step, liveness.all_or_none()(function))


def streams() -> bool:
    """Whether to stream leaves into one save: takes an Orbax that was tested, see `private`."""
    return private.is_tested("orbax-checkpoint")


def notices() -> tuple[str, ...]:
    """Notices about how checkpoints are saved with the installed Orbax."""
    if streams():
        return ()
    releases = private.tested_releases("orbax-checkpoint")
    return (
        f"{releases}: saving through its public API, which needs more memory and cannot --resume.",
    )
