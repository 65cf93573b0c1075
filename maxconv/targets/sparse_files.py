"""Checkpoints whose large values are stored elsewhere: their files on disk have holes instead.

Metadata and trees can be read from them as from complete files.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorstore as ts
from etils import epath

from maxconv.algebra import Box
from maxconv.algebra.boxes import intersect
from maxconv.sources.ocdbt import values
from maxconv.sources.orbax import Item

Fetch = Callable[[str, int, memoryview], None]  # file, start offset, buffer to fill

NEW = ".hollow"  # suffix of temporary files
MODE = 0o444  # file mode of hollow files, by which other processes recognize them


def make_hollow(path: epath.PathLike, spans: Iterable[tuple[int, int]]) -> None:
    """Replaces a file with one that has holes in place of some byte ranges."""
    file, at = Path(path), 0
    size, new = file.stat().st_size, file.with_name(file.name + NEW)
    with file.open("rb") as whole, new.open("wb") as hollow:
        hollow.truncate(size)
        for start, stop in [*spans, (size, size)]:
            whole.seek(at)
            hollow.seek(at)
            hollow.write(whole.read(max(0, start - at)))
            at = max(at, stop)
    new.chmod(MODE)
    new.replace(file)


@dataclass(frozen=True)
class HollowItem(Item):
    """A tree of arrays whose large values are fetched; `where`: file, start and end by key."""

    where: Mapping[str, tuple[str, int, int]]
    fetch: Fetch

    @classmethod
    def of(cls, item: Item, fetch: Fetch) -> "HollowItem":
        """An item with hollow files, made complete by `fetch`."""
        where = {key: (file, start, stop) for key, file, start, stop in values(item.directory)}
        return cls(**vars(item), where=where, fetch=fetch)

    def open(self, name: str, boxes: Sequence[Box] = ()) -> ts.Future[ts.TensorStore]:
        """Opens an array in memory that has just the chunks for these boxes."""
        memory = ts.KvStore.open("memory://").result()
        for raw in self.store.list(ts.KvStore.KeyRange(f"{name}/", f"{name}0")).result():
            key = raw.decode()
            if key not in self.where:
                memory[key] = self.store[key]
            elif self._matters(name, key, boxes):
                file, start, stop = self.where[key]
                value = bytearray(stop - start)
                self.fetch(file, start, memoryview(value))
                memory[key] = bytes(value)
        return ts.open({"driver": self.driver}, kvstore=memory / f"{name}/")

    def _matters(self, name: str, key: str, boxes: Sequence[Box]) -> bool:
        """Whether a chunk, whose key ends in its grid position, overlaps a box."""
        chunk = self.arrays[name].chunk or ()
        place = re.findall(r"\d+", key.removeprefix(name))
        extent = tuple((int(i) * n, (int(i) + 1) * n) for i, n in zip(place, chunk, strict=True))
        return any(intersect(extent, box) is not None for box in boxes)
