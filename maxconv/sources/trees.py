"""The parameters of a MaxText checkpoint as a source, whoever saved it.

Its tensors have the names of MaxText's tree, `decoder.layers.mlp.wi_0.kernel`, whatever is around
them: a trainer's state with its optimizer, the collections of Flax, the `value` leaves of NNX.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from threading import Lock
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from maxconv.algebra.boxes import Box, slices
from maxconv.errors import UserError
from maxconv.sources.base import Part, Source, TensorInfo, bit_views
from maxconv.sources.narrow import narrow, narrowed
from maxconv.sources.orbax import Item, find_items, open_item, reason

# Where MaxText's tree begins in the name of a leaf (layers/models.py, layers/decoders.py).
_ROOTS = {"audio_encoder", "decoder", "mtp_block", "token_embedder", "vision_encoder"}
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
        self._keeps = 0
        self._kept, self._lock = set[tuple[Any, ...]](), Lock()

    def _info(self, name: str, stored: str) -> TensorInfo:
        array = self.item.arrays[stored]
        dtype = ts.dtype(array.dtype).numpy_dtype
        chunk = tuple(map(min, array.inner or array.shape, array.shape))
        return TensorInfo(name, narrow(dtype), array.shape, chunk)

    def keep(self, nbytes: int) -> None:
        """Keeps up to so many bytes of decoded chunks, for steps that read parts of them."""
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": nbytes}})
        self._arrays.clear()
        self._keeps = nbytes

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """Fills each array; a chunk that several boxes have a part of is decoded once.

        `stats` counts whole chunks.
        """
        views = bit_views(info, parts)
        array, batch = self._open(info.name), ts.Batch()
        as_stored = array.dtype.numpy_dtype == info.dtype
        try:
            reads = [
                self._started(array[slices(box)], view, as_stored, batch) for box, view in views
            ]
            batch.submit()
            for (_, view), read in zip(views, reads, strict=True):
                found = read.result()
                if not as_stored:
                    view[...] = narrowed(np.asarray(found), info.name).view(view.dtype)
        except (OSError, ValueError) as error:
            raise OSError(f"{info.name} in {self.root} cannot be read: {reason(error)}") from None
        self._count(info, [box for box, _ in views])

    def _started(
        self, part: ts.TensorStore, view: np.ndarray, as_stored: bool, batch: ts.Batch
    ) -> Any:
        """A read of a box; into the array, if that is of the stored dtype."""
        if not as_stored:
            return part.read(order="C", batch=batch)
        into = ts.array(view.view(part.dtype.numpy_dtype), context=self._context)
        return into.write(part, batch=batch)

    def _count(self, info: TensorInfo, boxes: Iterable[Box]) -> None:
        """Counts the chunks of some boxes; those that are kept, once."""
        chunk = info.chunk or info.shape
        found = {
            (info.name, *at)
            for box in boxes
            for at in product(
                *(range(lo // n, -(-hi // n)) for (lo, hi), n in zip(box, chunk, strict=True))
            )
        }
        if self._keeps:
            with self._lock:
                found -= self._kept
                self._kept |= found
        sizes = (
            math.prod(
                min(n, size - i * n) for i, n, size in zip(at, chunk, info.shape, strict=True)
            )
            for _, *at in found
        )
        self.stats.add(sum(sizes) * info.dtype.itemsize, len(found))

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        array = self.item.open(self.stored[info.name]).result()
        return narrowed(np.asarray(array[slices(box)].read().result()), info.name)

    def _open(self, name: str) -> ts.TensorStore:
        if name not in self._arrays:
            kept = {"driver": self.item.driver, "recheck_cached_data": False}
            store = self.item.store / f"{self.stored[name]}/"
            self._arrays[name] = ts.open(kept, kvstore=store, context=self._context).result()
        return self._arrays[name]

    def held(self, ahead: int) -> int:
        """TensorStore decodes whole chunks into memory of its own, and keeps what it is told to."""
        largest = max(info.chunk_nbytes for info in self.tensors.values())
        return self._keeps + 2 * max(ahead, largest)  # compressed and decoded

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
