"""A MaxText checkpoint, in a directory or a bucket."""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from etils import epath

from maxconv.processes.agreement import once
from maxconv.sources.orbax import Item
from maxconv.targets import journal, orbax, place
from maxconv.targets.base import Progress, Target
from maxconv.targets.lazy import LazyTensor


@dataclass(frozen=True)
class Format:
    """How arrays are stored, and what MaxText wants to know beside them.

    Attributes:
        scan_layers, metadata: MaxText reads them when it loads the checkpoint.
        use_ocdbt, use_zarr3, compression: of the storage.
        window: bytes per process of what waits to be written.
        file_bytes: of an OCDBT data file that is written at once.
    """

    scan_layers: bool
    window: int
    use_ocdbt: bool = True
    use_zarr3: bool = True
    compression: bool = False
    file_bytes: int = orbax.FILE_BYTES
    metadata: Mapping[str, Any] = field(default_factory=dict)


class MaxTextTarget(Target):
    """`<directory>/0/items`, on a disk that all processes see, or in a bucket (gs://)."""

    def __init__(self, directory: str, form: Format):
        self.place = self.directory = directory
        self._form = form
        self._kept: dict[str, Any] = {}

    def begin(self, record: Mapping[str, Any], resume: bool) -> tuple[Set[str], tuple[str, ...]]:
        if resume:
            once(partial(journal.keep, self.directory))
            self._kept = journal.finished(self.directory) if orbax.streams() else {}
        if not self._kept:
            once(partial(place.clear, self.directory))
            once(partial(leave_record, self.directory, place.UNFINISHED_WORDS, record))
        return self._kept.keys(), orbax.notices()

    def wait_for_room(self) -> None:
        """Called before each part is made; returns when there is room for it."""

    def write(self, arrays: Mapping[str, LazyTensor | jax.Array], progress: Progress) -> None:
        form = self._form
        orbax.save(
            self.directory,
            orbax.train_state(arrays),
            form.scan_layers,
            form.window,
            progress,
            orbax.context(form.use_ocdbt, form.use_zarr3, form.compression, form.file_bytes),
            self._kept,
            form.metadata,
            self.wait_for_room,
        )

    def commit(self, record: Mapping[str, Any]) -> None:
        if jax.process_index() == 0:
            leave_record(self.directory, place.WORDS, record)
            (epath.Path(self.directory) / place.UNFINISHED_WORDS).unlink(missing_ok=True)
            journal.clear(self.directory)

    def saved(self, item: Item) -> Item:
        return item


def leave_record(directory: str, name: str, record: Mapping[str, Any]) -> None:
    """Says beside the checkpoint how it is made: for verify, --resume and people."""
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(record, indent=2) + "\n")
