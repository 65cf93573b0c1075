"""What a save has finished so far, kept for another attempt when it is cut off.

Orbax writes the leaves of each process into an OCDBT store of its own, below the directory that it
renames when all is there. Such a store is whole at any time, so a journal beside its data, of the
leaves that are durable in it, is all that another attempt needs: it moves the stores into its own
unfinished directory, and writes what is missing into them.
"""

import itertools
import os
import time
from typing import Any

import jax
from etils import epath

from maxconv.processes.agreement import gathered
from maxconv.targets import place

INTERVAL = 1  # seconds between two journals: no more than that is done again
_JOURNAL = "finished.json"
_KEPT = f"{place.UNFINISHED}-kept"  # where stores wait for the next attempt
_ANY_STORE = "ocdbt.process_*"
ATTEMPT = "attempt"  # in the names of the stores of attempts that were cut off


def keep(directory: str) -> None:
    """Puts the stores of the attempts before aside, for this one, and clears the rest.

    Each gets a name of its own, `ocdbt.process_<process>attempt<number>`, as Orbax may have begun a
    new `ocdbt.process_<process>` by the time that they are moved back; it merges whatever begins so
    and goes on with letters and digits.
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


def finished(directory: str) -> dict[str, Any]:
    """The metadata of the leaves that all processes have in the stores that were kept, by name."""
    stores = _stores(epath.Path(directory) / _KEPT)
    mine = {name: metadata for store in stores for name, metadata in _journal(store).items()}
    everywhere = set.intersection(*map(set, gathered(list(mine))))
    return {name: metadata for name, metadata in mine.items() if name in everywhere}


def clear(directory: str) -> None:
    """Removes what is left once a conversion is finished."""
    root = epath.Path(directory)
    for journal in root.glob(f"{place.STEP}/items/{_ANY_STORE}/{_JOURNAL}"):
        journal.unlink()
        if not any(journal.parent.iterdir()):  # this process had nothing to write
            journal.parent.rmdir()
    if (root / _KEPT).exists():
        (root / _KEPT).rmtree()


class Journal:
    """Keeps the journal of this process' store in `items`, the directory that Orbax writes to.

    Brings the stores of the attempts before this one, which `keep` put aside, back.
    In a bucket, where nothing can be moved, and without OCDBT it does nothing.
    """

    def __init__(self, items: epath.Path, use_ocdbt: bool):
        self._store, self._metadata, self._written = _store(items), list[Any](), 0.0
        self._works = use_ocdbt and "://" not in os.fspath(items)
        if self._works:
            for store in _stores(items.parent.parent / _KEPT):
                store.rename(items / store.name)

    def add(self, metadata: Any) -> None:
        """Notes a leaf that is durable."""
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


def _journal(store: epath.Path) -> dict[str, Any]:
    try:
        said = _serializer().deserialize((store / _JOURNAL).read_text())
        return {metadata.param_name: metadata for metadata in said}
    except (OSError, ValueError):
        return {}


def _serializer() -> Any:
    from maxconv.private.orbax import array_metadata_store  # only streamed saves have journals

    return array_metadata_store.Serializer()
