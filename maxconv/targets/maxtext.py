"""A MaxText checkpoint, in a directory or a bucket."""

from collections.abc import Iterable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
from etils import epath

from maxconv.errors import ConversionError, UserError
from maxconv.processes import liveness
from maxconv.processes.agreement import once, same_error_everywhere
from maxconv.sources.orbax import Item
from maxconv.targets import completeness, journal, orbax, place
from maxconv.targets.base import Progress, Target
from maxconv.targets.lazy import LazyTensor
from maxconv.targets.ownership import Ownership, owned_by_all


@dataclass(frozen=True)
class Format:
    """The storage format, and MaxText's metadata.

    Attributes:
        scan_layers, metadata: read by MaxText when it loads the checkpoint.
        use_ocdbt, use_zarr3, compression: the storage format.
        window: maximum bytes per process that wait to be written.
        file_bytes: target size of an OCDBT data file.
        empty: what a training state has where there are no arrays, by name; None if the arrays are
            parameters alone.
    """

    scan_layers: bool
    window: int
    use_ocdbt: bool = True
    use_zarr3: bool = True
    compression: bool = False
    file_bytes: int = orbax.FILE_BYTES
    metadata: Mapping[str, Any] = field(default_factory=dict)
    empty: Mapping[str, Any] | None = None


class MaxTextTarget(Target):
    """`<directory>/0/items`, on a file system that all processes share, or in a bucket (gs://)."""

    def __init__(self, directory: str, form: Format, overwrite: bool = False):
        self.place = self.directory = directory
        self._form, self._overwrite = form, overwrite
        self._kept: dict[str, Any] = {}
        self._ownership: Ownership | None = None  # held by process 0, on behalf of all
        self._is_owned = False

    @property
    def _lock(self) -> str:
        """The lock file, which names the conversion that writes here; removed at the end."""
        return f"{self.directory.rstrip('/')}/maxconv.lock"

    def begin(self, record: Mapping[str, Any], resume: bool) -> tuple[Set[str], tuple[str, ...]]:
        self._own()
        with same_error_everywhere():
            if jax.process_index() == 0:
                self._look_again(record, resume)
        notices: tuple[str, ...] = ()
        if resume:
            once(partial(journal.keep, self.directory))
            if orbax.streams():
                self._kept, notices = journal.finished(self.directory)
        if not self._kept:
            once(partial(place.clear, self.directory))
            once(partial(place.leave_record, self.directory, place.UNFINISHED_WORDS, record))
        return self._kept.keys(), (*notices, *orbax.notices())

    def _own(self) -> None:
        """Takes the lock, so that no other conversion writes here.

        Raises:
            UserError: another conversion holds it.
        """
        self._ownership, self._is_owned = owned_by_all(self._lock, self.place), True

    def _look_again(self, record: Mapping[str, Any], resume: bool) -> None:
        """Raises UserError if the directory has changed before this conversion took the lock."""
        if problems := place.problems(self.directory, 0, self._overwrite):
            raise UserError(problems)
        was: Mapping[str, Any] | None = record
        with suppress(ValueError):  # damaged
            if resume:
                was = None
                was = place.record(self.directory, place.UNFINISHED_WORDS)
        if was is None or was.get("identity") != record.get("identity"):
            raise UserError(
                f"{self.directory} was changed by another conversion; run the same command again."
            )

    def wait_for_room(self) -> None:
        """Called before each part is made; blocks until there is room for it."""

    def write(self, arrays: Mapping[str, LazyTensor | jax.Array], progress: Progress) -> None:
        form = self._form
        if form.empty is None:
            state = orbax.train_state(arrays)
        else:
            state = orbax.whole_state({**arrays, **form.empty})
        orbax.save(
            self.directory,
            state,
            form.scan_layers,
            form.window,
            progress,
            orbax.context(form.use_ocdbt, form.use_zarr3, form.compression, form.file_bytes),
            self._kept,
            form.metadata,
            self.wait_for_room,
        )
        once(partial(self._check_whole, arrays.keys()))

    def _check_whole(self, leaves: Iterable[str]) -> None:
        """Raises ConversionError, and withdraws the checkpoint, if files are missing."""
        lost = completeness.problems(place.items(self.directory), leaves)
        if lost:
            place.withdraw(self.directory)
            raise ConversionError(
                [f"{self.directory} lost files during the conversion; run it again.", *lost]
            )

    def commit(self, record: Mapping[str, Any]) -> None:
        liveness.saved()  # Orbax has renamed the step, or an earlier attempt did
        self._leave_record(record)

    def _leave_record(self, record: Mapping[str, Any]) -> None:
        if not self._is_owned:  # an earlier attempt had written everything
            self._own()
        if jax.process_index() == 0:
            place.leave_record(self.directory, place.WORDS, record)
            journal.clear(self.directory)
            # Removed last: it marks everything next to it as ours.
            (epath.Path(self.directory) / place.UNFINISHED_WORDS).unlink(missing_ok=True)

    def close(self) -> None:
        if self._ownership is not None:
            self._ownership.release()

    def saved(self, item: Item) -> Item:
        return item
