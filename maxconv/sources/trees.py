"""The parameters of a MaxText checkpoint as a source, whoever saved it.

Its tensors have the names of MaxText's tree, `decoder.layers.mlp.wi_0.kernel`, whatever is around
them: a trainer's state with its optimizer, the collections of Flax, the `value` leaves of NNX.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import tensorstore as ts
from etils import epath

from maxconv.algebra.boxes import Box, slices
from maxconv.errors import UserError
from maxconv.sources.base import Part, Source, TensorInfo, bit_views
from maxconv.sources.narrow import narrow, narrowed
from maxconv.sources.orbax import (
    CHECKPOINT_METADATA,
    METADATA,
    Item,
    find_items,
    open_item,
    reason,
)

# Where MaxText's tree begins in the name of a leaf (layers/models.py, layers/decoders.py).
_ROOTS = {"audio_encoder", "decoder", "mtp_block", "token_embedder", "vision_encoder"}
_MANIFEST = "manifest.ocdbt"  # of a database; changes with whatever is written into it
_NOT_WEIGHTS = {"opt_state", "optimizer", "mu", "nu", "rngs", "dropout", "cache", "batch_stats"}


class TreeSource(Source):
    """The parameters that Orbax saved, read with TensorStore.

    Attributes:
        item: the checkpoint.
        stored: the name of each of `tensors` in it.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it has no parameters of MaxText.
    """

    item: Item
    stored: Mapping[str, str]

    def __init__(self, path: str, step: int | None = None):
        super().__init__()
        self.item = open_item(_directory(path, step))
        self.root, self.revision, self.config = str(self.item.directory), None, {}
        self.is_shared = True
        names = dict(_parameters(self.item.arrays))
        if not names:
            raise UserError(
                f"{self.root} holds no parameters of MaxText, whose names begin with decoder or "
                "token_embedder; give the checkpoint of a model."
            )
        self.stored = names
        self.tensors = {ours: self._info(ours, theirs) for ours, theirs in sorted(names.items())}
        self.notices = ()
        self._arrays: dict[str, ts.TensorStore] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def _info(self, name: str, stored: str) -> TensorInfo:
        array = self.item.arrays[stored]
        dtype = ts.dtype(array.dtype).numpy_dtype
        chunk = tuple(map(min, array.inner or array.shape, array.shape))
        return TensorInfo(name, narrow(dtype), array.shape, chunk)

    def keep(self, nbytes: int) -> None:
        """Keeps up to so many bytes of decoded chunks, for steps that read parts of them."""
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": nbytes}})
        self._arrays.clear()

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        views = bit_views(info, parts)
        array = self._open(info.name)
        try:
            reads = [array[slices(box)].read(order="C") for box, _ in views]
            for (_, view), read in zip(views, reads, strict=True):
                found = narrowed(np.asarray(read.result()), info.name)
                view[...] = found.view(view.dtype)
                self.stats.add(found.nbytes, 1)
        except (OSError, ValueError) as error:
            raise OSError(f"{info.name} in {self.root} cannot be read: {reason(error)}") from None

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        array = self.item.open(self.stored[info.name]).result()
        return narrowed(np.asarray(array[slices(box)].read().result()), info.name)

    def versions(self) -> dict[str, str]:
        """A digest of the files that are written anew whenever a checkpoint is saved."""
        digest, directory = hashlib.sha256(), self.item.directory
        for file in (
            directory / METADATA,
            directory / _MANIFEST,
            *(parent / CHECKPOINT_METADATA for parent in (directory, directory.parent)),
        ):
            digest.update(file.read_bytes() if file.exists() else b"")
        return {"the checkpoint": digest.hexdigest()[:12]}

    def _open(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            kept = {"driver": self.item.driver, "recheck_cached_data": False}
            store = self.item.store / f"{self.stored[name]}/"
            self._arrays[name] = ts.open(kept, kvstore=store, context=self._context).result()
        return self._arrays[name]

    def held(self, ahead: int) -> int:
        """TensorStore decodes into memory of its own."""
        return ahead

    def close(self) -> None:
        self._arrays.clear()


def _directory(path: str, step: int | None) -> epath.Path:
    """The tree of parameters at a path: of a run, of a step, or the tree itself."""
    place = epath.Path(path)
    runs = [place, place / "checkpoints"]
    if step is not None:
        runs = [run / str(step) for run in runs]
    for run in runs:
        items = find_items(run)
        named = {item.name: item for item in items}
        for name in ("items", "model_params", "actor", "default", "state"):
            if name in named:
                return named[name]
        if items:
            return items[0]
    what = f"step {step} of a checkpoint" if step is not None else "a checkpoint"
    raise UserError(
        f"{path} is not {what} that Orbax saved (there is no _METADATA); give the directory that "
        "holds 0/items, or a run's checkpoints."
    )


def _parameters(arrays: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The name in MaxText's tree, and the stored one, of each array that is a parameter."""
    ranks: dict[str, int] = {}
    for stored in arrays:
        parts = stored.split(".")
        at = next((i for i, part in enumerate(parts) if part in _ROOTS), None)
        if at is None or not _NOT_WEIGHTS.isdisjoint(parts):
            continue
        inner = parts[at:-1] if parts[-1] in ("value", "raw_value") else parts[at:]
        name = ".".join(_joined(inner))
        rank = parts[:at].count("params")  # what is under params is the parameter itself
        if rank >= ranks.get(name, -1):
            ranks[name] = rank
            yield name, stored


def _joined(parts: Sequence[str]) -> Iterator[str]:
    """The parts of a name, where a list of layers (`layers`, `0`) is `layers_0`."""
    before = None
    for part in parts:
        if before is not None and part.isdecimal():
            before = f"{before}_{part}"
            continue
        if before is not None:
            yield before
        before = part
    if before is not None:
        yield before
