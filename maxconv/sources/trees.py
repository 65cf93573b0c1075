"""The parameters of a MaxText checkpoint as a source, whoever saved it.

Its tensors have the names of MaxText's tree, `decoder.layers.mlp.wi_0.kernel`, whatever is around
them: a trainer's state with its optimizer, the collections of Flax, the `value` leaves of NNX.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from threading import Lock
from typing import Any

import numpy as np
import tensorstore as ts

from maxconv.algebra.boxes import Box, slices, volume
from maxconv.errors import UserError
from maxconv.sources.adapted import AdaptedSource
from maxconv.sources.base import Part, Source, TensorInfo, bit_views
from maxconv.sources.narrow import narrow, narrowed
from maxconv.sources.orbax import CHECKPOINT_METADATA, METADATA, Item, Stored, open_item, reason
from maxconv.sources.runs import parameters, tree_at

_FACTOR = re.compile(r"(.+?)(?:\.kernel)?_lora_([ab])")  # utils/lora_utils.py
OPTIMIZER = "opt_state."  # before the names of the state of MaxText's optimizer
_METADATA_BYTES = 1 << 20  # that TensorStore keeps beside chunks
_MANIFEST = "manifest.ocdbt"  # of a database; changes with whatever is written into it


class TreeSource(Source):
    """The parameters that Orbax saved, read with TensorStore.

    Attributes:
        item: the checkpoint.
        stored: the name of each of `tensors` in it.
        beside: those of `tensors` that are no parameters, but the rest of a training state.

    Raises:
        UserError: there is no checkpoint, it is damaged, or it has no parameters of MaxText.
    """

    item: Item
    stored: Mapping[str, str]
    beside: Sequence[str]

    def __init__(self, path: str, step: int | None = None, whole: bool = False):
        """Opens the checkpoint at a path, or the one of a training run at a step.

        `whole`: with what is no parameter, under the names that it has there.
        """
        super().__init__()
        directory, within = tree_at(path, step)
        self.item = open_item(directory)
        self.root, self.revision, self.config = str(self.item.directory), None, {}
        self.is_shared = "://" in self.root
        names, others = parameters(self.item.arrays, within, self.root)
        if not names:
            raise UserError(
                f"{self.root} holds no parameters of MaxText, whose names begin with decoder or "
                "token_embedder; give the checkpoint of a model."
            )
        taken = {*names.values()}
        self.beside = [name for name in self.item.arrays if name not in taken] if whole else []
        self.stored = names = names | {name: name for name in self.beside}
        self.tensors = {ours: self._info(ours, theirs) for ours, theirs in sorted(names.items())}
        self.notices = tuple(f"{other} in the checkpoint is not read" for other in others)
        self._arrays: dict[str, ts.TensorStore] = {}
        self._beside: Mapping[str, Source] = {}
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._keeps = 0
        self._kept, self._lock = set[tuple[Any, ...]](), Lock()

    def _info(self, name: str, stored: str) -> TensorInfo:
        array = self.item.arrays[stored]
        dtype = ts.dtype(array.dtype).numpy_dtype
        chunk = tuple(map(min, array.inner or array.shape, array.shape))
        return TensorInfo(name, narrow(dtype), array.shape, chunk)

    @property
    def custom(self) -> Mapping[str, Any]:
        """What MaxText noted beside the tree."""
        return self.item.custom

    def keep(self, nbytes: int) -> None:
        """Keeps up to so many bytes of decoded chunks, for steps that read parts of them."""
        limit = nbytes + _METADATA_BYTES if nbytes else 0
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
        self._arrays.clear()
        self._keeps = nbytes

    def shared(self, calls: Iterable[tuple[str, Iterable[Box]]]) -> int:
        """The bytes to `keep` so that some calls of `read` decode each chunk once: the most that
        calls have between them which read parts of the same chunks."""
        touched = [_chunks(self.tensors[name], boxes) for name, boxes in calls]
        last = {chunk: i for i, chunks in enumerate(touched) for chunk in chunks}
        most, start, end, run = 0, 0, 0, set[tuple[Any, ...]]()
        for i, chunks in enumerate(touched):
            run |= chunks
            end = max([end, *(last[chunk] for chunk in chunks)])
            if i == end:
                if start < end:
                    most = max(most, sum(_nbytes(self.tensors[c[0]], [c]) for c in run))
                start, end, run = i + 1, i + 1, set()
        return most

    def put_beside(self, other: Source, names: Iterable[str]) -> None:
        """Adds tensors of another source, which are read from it."""
        self._beside = dict.fromkeys(names, other)
        self.tensors = {**self.tensors, **{name: other.tensors[name] for name in self._beside}}

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """Fills each array; a chunk that several boxes have a part of is decoded once.

        `stats` counts whole chunks.
        """
        if other := self._beside.get(info.name):
            return other.read(info, parts)
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
        found = _chunks(info, boxes)
        if self._keeps:
            with self._lock:
                found -= self._kept
                self._kept |= found
        self.stats.add(_nbytes(info, found), len(found))

    def decoded(self, calls: Iterable[tuple[str, Iterable[Box]]]) -> int:
        """The bytes that `stats` counts for some calls of `read`, each with a tensor's name."""
        total, kept = 0, set[tuple[Any, ...]]()
        for name, boxes in calls:
            if name in self._beside:
                total += sum(volume(box) for box in boxes) * self.tensors[name].dtype.itemsize
                continue
            found = _chunks(self.tensors[name], boxes) - kept
            total += _nbytes(self.tensors[name], found)
            kept |= found if self._keeps else set()
        return total

    @property
    def empty(self) -> dict[str, Any]:
        """What the state of the optimizer has where there are no arrays, by name."""
        kinds: dict[str, Any] = {"None": None, "NamedTuple": None}  # as Orbax restores them
        kinds |= {"Dict": {}, "List": [], "Tuple": ()}
        return {
            name: kinds[kind]
            for name, kind in self.item.others.items()
            if name.startswith(OPTIMIZER) and kind in kinds
        }

    @property
    def unread(self) -> list[Stored]:
        """The arrays that are no parameters."""
        read = {*self.stored.values()}
        return [array for name, array in self.item.arrays.items() if name not in read]

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        if other := self._beside.get(info.name):
            return other.plain(info, box)
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
        """TensorStore decodes whole chunks into memory of its own, and keeps what it is told to."""
        largest = max(info.chunk_nbytes for info in self.tensors.values())
        return self._keeps + 2 * max(ahead, largest)  # compressed and decoded

    def close(self) -> None:
        self._arrays.clear()


class AdaptedTree(AdaptedSource):
    """The parameters of a checkpoint, and the LoRA factors of another."""

    def __init__(self, base: TreeSource, adapter: TreeSource):
        adapter.tensors = {n: info for n, info in adapter.tensors.items() if is_factor(n)}
        if not adapter.tensors:
            raise UserError(
                f"{adapter.root} has no LoRA factors; give the checkpoint of an adapter."
            )
        super().__init__(base, adapter)
        self._trees, self.custom = (base, adapter), {**base.custom, **adapter.custom}
        self.item = base.item

    def put_beside(self, other: Source, names: Iterable[str]) -> None:
        """See `TreeSource.put_beside`."""
        base, _ = self._trees
        base.put_beside(other, names)
        self.tensors = {**self.tensors, **base.tensors}

    def keep(self, nbytes: int) -> None:
        """See `TreeSource.keep`."""
        for tree in self._trees:
            tree.keep(nbytes)

    def decoded(self, calls: Iterable[tuple[str, Iterable[Box]]]) -> int:
        """See `TreeSource.decoded`."""
        calls = [*calls]
        return sum(
            tree.decoded((name, boxes) for name, boxes in calls if name in tree.tensors)
            for tree in self._trees
        )

    @property
    def unread(self) -> list[Stored]:
        """See `TreeSource.unread`."""
        return [array for tree in self._trees for array in tree.unread]


Tree = TreeSource | AdaptedTree


def is_fp8(info: TensorInfo) -> bool:
    """Whether a parameter is stored in fp8, with its scales beside it."""
    return info.dtype.name.startswith("float8")


def is_factor(name: str) -> bool:
    """Whether a parameter is one of the two factors of a LoRA adapter."""
    return _FACTOR.fullmatch(name) is not None


def factors(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """The parameters that are factors, "A" and "B", by the path of their kernel, which is without
    `.kernel`."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _FACTOR.fullmatch(name):
            found.setdefault(match[1], {})[match[2].upper()] = name
    return found


def _chunks(info: TensorInfo, boxes: Iterable[Box]) -> set[tuple[Any, ...]]:
    """The chunks that some boxes of a tensor have a part of: its name, and their places."""
    chunk = info.chunk or info.shape
    return {
        (info.name, *at)
        for box in boxes
        for at in product(
            *(range(lo // n, -(-hi // n)) for (lo, hi), n in zip(box, chunk, strict=True))
        )
    }


def _nbytes(info: TensorInfo, chunks: Iterable[tuple[Any, ...]]) -> int:
    extents = info.chunk or info.shape
    sizes = (
        math.prod(min(n, size - i * n) for i, n, size in zip(at, extents, info.shape, strict=True))
        for _, *at in chunks
    )
    return sum(sizes) * info.dtype.itemsize
