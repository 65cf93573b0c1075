"""A MaxText checkpoint in a repository of the Hugging Face Hub."""

import os
from collections.abc import Mapping, Set
from typing import Any

import jax
from etils import epath

from maxconv.errors import UserError
from maxconv.processes import liveness
from maxconv.processes.agreement import gathered, once, same_error_everywhere
from maxconv.sources.orbax import Item
from maxconv.targets import orbax, place
from maxconv.targets.maxtext import Format, MaxTextTarget
from maxconv.targets.publication import Publication


class HubTarget(MaxTextTarget):
    """One commit with a checkpoint. Orbax writes to a scratch directory; process 0 uploads.

    `limit`: bytes of data files that a process may have on disk before it makes another slab.
    """

    def __init__(self, publication: Publication, form: Format, limit: int):
        # The scratch directory is maxconv's own, so its contents may be replaced.
        super().__init__(os.fspath(publication.scratch), form, overwrite=True)
        self.place, self._publication, self._limit = publication.place, publication, limit

    @property
    def _lock(self) -> str:
        return f"{self.directory}.lock"  # next to it: everything inside is uploaded

    def begin(self, record: Mapping[str, Any], resume: bool) -> tuple[Set[str], tuple[str, ...]]:
        # What an earlier attempt uploaded is not recorded, so it cannot be resumed.
        _, told = super().begin(record, resume=False)
        going = self._publication
        with same_error_everywhere():
            if not (epath.Path(self.directory) / place.UNFINISHED_WORDS).exists():
                raise UserError(
                    f"The processes do not share {going.scratch.parent}, where the checkpoint for "
                    f"{going.place} is staged; set HF_HOME to a directory that all of them share, "
                    "or convert to gs:// and upload from there."
                )
        notices: list[str] = []
        with same_error_everywhere():
            if jax.process_index() == 0:
                notices = going.begin()
        return frozenset(), (*told, *notices)

    def wait_for_room(self) -> None:
        self._publication.wait_for_room(jax.process_index(), self._limit)

    def commit(self, record: Mapping[str, Any]) -> None:
        self._leave_record(record)
        once(self._publication.commit, patience=orbax.TIMEOUT_SECONDS)
        liveness.saved()

    def saved(self, item: Item) -> Item:
        (made, *_) = gathered(self._publication.made)
        return self._publication.whole(item, made)

    def close(self) -> None:
        if self._ownership is not None and self._ownership.is_mine:
            self._publication.close()
        super().close()
