"""Records which leaves a save has finished, so that an interrupted one can be resumed.

Orbax writes the leaves of each process into an OCDBT store of its own, below the directory that it
renames at the end. Such a store is consistent at any time. So all that a later attempt needs is a
journal, next to the data, of the leaves that are durable: it moves the stores into its own
unfinished directory, and writes the leaves that are missing.
"""

import itertools
import os
import time
from typing import Any

import jax
from etils import epath

from maxconv.processes.agreement import gathered
from maxconv.sources.orbax import open_store
from maxconv.targets import completeness, place

INTERVAL = 1  # seconds between two writes of the journal: the most work that is repeated
_JOURNAL = "finished.json"
_LARGEST = 256 << 20  # bytes of a journal
_NOTHING = completeness.Leaf(0, 0, None)
_KEPT = f"{place.UNFINISHED}-kept"  # where stores are kept for the next attempt
_ANY_STORE = "ocdbt.process_*"
ATTEMPT = "attempt"  # in the names of stores of interrupted attempts


def keep(directory: str) -> None:
    """Sets the stores of earlier attempts aside for this one, and removes everything else.

    Each is renamed to `ocdbt.process_<process>attempt<number>`, because Orbax may have created a
    new `ocdbt.process_<process>` by the time they are moved back. It merges every store whose name
    starts with `ocdbt.process_` followed by letters and digits.
    """
    root = epath.Path(directory)
    kept = root / _KEPT
    kept.mkdir(parents=True, exist_ok=True)
    for store in root.glob(f"{place.UNFINISHED}/items.*/{_ANY_STORE}"):
        process = store.name.partition(ATTEMPT)[0]
        names = (kept / f"{process}{ATTEMPT}{attempt}" for attempt in itertools.count())
        store.rename(next(name for name in names if not name.exists()))
    for path in root.glob(f"{place.UNFINISHED}*"):
        if path.name != _KEPT:
            path.rmtree()


def finished(directory: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The metadata of leaves that are complete in the stores that were kept, by name; and notices.

    Journals are not trusted: the chunks in the stores of all processes are counted.
    """
    claimed: dict[str, Any] = {}
    held: dict[str, tuple[int, int]] = {}  # number of chunks here, and in the whole leaf
    damaged: list[str] = []
    for store in _stores(epath.Path(directory) / _KEPT):
        if not _is_sound(store):  # Orbax could not merge it with the others
            store.rmtree()
            continue
        journal = _journal(store)
        if journal is None:
            damaged.append(f"{store / _JOURNAL} is damaged; its leaves are converted again")
        there = _whole(store) if journal else {}
        for name, metadata in (journal or {}).items():
            leaf = there.get(name, _NOTHING)
            if leaf.chunk in (None, tuple(metadata.chunk_shape)):
                claimed[name], held[name] = metadata, (leaf.chunks, leaf.total)
    seen = gathered([held, damaged])
    whole = {
        name
        for name in set.intersection(*(set(held) for held, _ in seen))
        if sum(held[name][0] for held, _ in seen) >= max(1, max(held[name][1] for held, _ in seen))
    }
    notices = tuple(notice for _, damaged in seen for notice in damaged)
    return {name: claimed[name] for name in claimed if name in whole}, notices


def clear(directory: str) -> None:
    """Removes journals and stores that are no longer needed after a conversion."""
    root = epath.Path(directory)
    for journal in root.glob(f"{place.STEP}/items/{_ANY_STORE}/{_JOURNAL}"):
        journal.unlink(missing_ok=True)
        if not any(journal.parent.iterdir()):  # this process had nothing to write
            journal.parent.rmdir()
    if (root / _KEPT).exists():
        (root / _KEPT).rmtree()


class Journal:
    """Writes the journal of this process' store in `items`, the directory that Orbax writes to.

    Also moves the stores of earlier attempts, which `keep` set aside, back. Does nothing in a
    bucket, where nothing can be moved, or without OCDBT.
    """

    def __init__(self, items: epath.Path, use_ocdbt: bool):
        self._store, self._metadata, self._written = _store(items), list[Any](), 0.0
        self._works = use_ocdbt and "://" not in os.fspath(items)
        if self._works:
            for store in _stores(items.parent.parent / _KEPT):
                store.rename(items / store.name)

    def add(self, metadata: Any) -> None:
        """Adds a leaf that is durable."""
        self._metadata.append(metadata)
        if time.monotonic() - self._written > INTERVAL:
            self.write()

    def write(self) -> None:
        if self._works:
            self._store.mkdir(exist_ok=True)
            new = self._store / f"{_JOURNAL}.new"
            new.write_text(_serializer().serialize(self._metadata))
            new.replace(self._store / _JOURNAL)
            self._written = time.monotonic()


def _store(items: epath.Path) -> epath.Path:
    return items / f"ocdbt.process_{jax.process_index()}"


def _stores(kept: epath.Path) -> list[epath.Path]:
    return sorted(kept.glob(f"{_store(kept).name}{ATTEMPT}*"))


def _journal(store: epath.Path) -> dict[str, Any] | None:
    """The metadata of the leaves in a store's journal, by name; None if it is damaged."""
    path = store / _JOURNAL
    if not path.exists():
        return {}
    try:
        if path.is_file() and path.stat().length <= _LARGEST:
            found = _serializer().deserialize(path.read_text())
            if all(map(_is_metadata, found)):
                return {metadata.param_name: metadata for metadata in found}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _is_metadata(found: Any) -> bool:
    shapes = (found.write_shape, found.chunk_shape)
    return isinstance(found.param_name, str) and all(
        isinstance(shape, tuple | list) and all(type(n) is int for n in shape) for shape in shapes
    )


def _is_sound(store: epath.Path) -> bool:
    """Whether every byte that the index of a store points to exists.

    A process that has written no leaf yet has a journal, but no index and no data.
    """
    if not (store / "manifest.ocdbt").exists():
        return not (store / "d").exists()
    try:
        return not completeness.broken(store)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _whole(store: epath.Path) -> dict[str, completeness.Leaf]:
    """The intact leaves of a store, complete or not; empty if it cannot be read."""
    try:
        return completeness.leaves_in(store, open_store(store, ocdbt=True))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _serializer() -> Any:
    from maxconv.private.orbax import array_metadata_store  # only streamed saves have journals

    return array_metadata_store.Serializer()
