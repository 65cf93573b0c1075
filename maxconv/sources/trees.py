"""The parameters of a MaxText checkpoint as a source, whoever saved it.

Its tensors have the names of MaxText's tree, `decoder.layers.mlp.wi_0.kernel`, whatever is around
them: a trainer's state with its optimizer, the collections of Flax, the `value` leaves of NNX.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import tensorstore as ts

from maxconv.algebra.boxes import Box, slices
from maxconv.errors import UserError
from maxconv.sources.base import Part, Source, TensorInfo, bit_views
from maxconv.sources.narrow import narrow, narrowed
from maxconv.sources.orbax import Item, open_item, reason
from maxconv.sources.runs import parameters, tree_at


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
        directory, within = tree_at(path, step)
        self.item = open_item(directory)
        self.root, self.revision, self.config = str(self.item.directory), None, {}
        self.is_shared = True
        names, others = parameters(self.item.arrays, within, self.root)
        if not names:
            raise UserError(
                f"{self.root} holds no parameters of MaxText, whose names begin with decoder or "
                "token_embedder; give the checkpoint of a model."
            )
        self.stored = names
        self.tensors = {ours: self._info(ours, theirs) for ours, theirs in sorted(names.items())}
        self.notices = tuple(f"{other} in the checkpoint is not exported" for other in others)
        self._arrays: dict[str, ts.TensorStore] = {}
        self._beside: Mapping[str, Source] = {}
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

    def put_beside(self, other: Source, names: Iterable[str]) -> None:
        """Adds tensors of another source, which are read from it."""
        self._beside = dict.fromkeys(names, other)
        self.tensors = {**self.tensors, **{name: other.tensors[name] for name in self._beside}}

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        if other := self._beside.get(info.name):
            return other.read(info, parts)
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
        if other := self._beside.get(info.name):
            return other.plain(info, box)
        array = self.item.open(self.stored[info.name]).result()
        return narrowed(np.asarray(array[slices(box)].read().result()), info.name)

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
