"""The checkpoint of MaxText: what Orbax is told to save, and in which of two ways it is done."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from types import MappingProxyType
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from maxconv import private
from maxconv.targets.lazy import LazyTensor

__all__ = ["LazyTensor", "Progress", "TrainState", "context", "save", "streams", "train_state"]

FILE_BYTES = 2 << 30  # MaxText's target size of a data file, and the largest chunk
TIMEOUT_SECONDS = 7 * 24 * 3600  # the whole conversion happens inside one save


@dataclass
class Progress:
    """How far a save is, in this process. `written` and `total` are bytes of finished leaves."""

    total: int = 0
    written: int = 0
    leaves: int = 0
    held: int = 0
    peak_held: int = 0
    begun: Event = field(default_factory=Event)
    """Set when Orbax has begun, on the main thread and with collectives: ours may follow."""

    def hold(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak_held = max(self.peak_held, self.held)


def context(
    use_ocdbt: bool = True,
    use_zarr3: bool = True,
    compression: bool = False,
    file_bytes: int = FILE_BYTES,
) -> ocp.Context:
    """The Orbax context of MaxText 0.2.5's checkpoint manager (common/checkpoint_context.py).

    Args:
        use_ocdbt, use_zarr3, compression: the storage format.
        file_bytes: an OCDBT data file that has as much is written at once, beside others. Smaller
            ones wait for each other.
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
    """What MaxText saves, in its order: flax.training.train_state.TrainState without functions."""

    step: int
    params: dict[str, Any]
    opt_state: dict[str, Any]


def train_state(leaves: Iterable[tuple[Sequence[str], Any]]) -> TrainState:
    """The state before the first step: parameters nested by their paths, no optimizer state."""
    params: dict[str, Any] = {}
    for path, leaf in leaves:
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return TrainState(0, params, {})


def save(
    directory: str,
    state: TrainState,
    scan_layers: bool,
    window: int,
    progress: Progress,
    ctx: ocp.Context | None = None,
    kept: Mapping[str, Any] = MappingProxyType({}),
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Saves a state, lazy leaves and all, as step 0 under `directory`: `<directory>/0/items`.

    `window` in bytes per process. `kept`: what `resume.finished` says of leaves that are not to be
    made, as an attempt before this one wrote them. `metadata`: more that MaxText reads. Returns
    when everything is durable; until then nothing there reads as a checkpoint.
    """
    if streams():
        from maxconv.targets.streaming import save as chosen
    else:
        from maxconv.targets.partial_save import save as chosen
    custom = {"scan_layers": scan_layers, **metadata}
    chosen(directory, state, window, progress, ctx or context(), kept, custom)


def streams() -> bool:
    """Whether leaves are streamed into one save, with the parts of Orbax that this takes."""
    return private.is_tested("orbax-checkpoint")


def notices() -> tuple[str, ...]:
    """What a person should know of how checkpoints are saved here."""
    if streams():
        return ()
    releases = private.tested_releases("orbax-checkpoint")
    return (
        f"{releases}: saving leaf by leaf through its public API, which --resume cannot resume.",
    )
