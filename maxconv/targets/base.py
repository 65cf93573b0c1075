"""The interface of a target: where a job writes its arrays."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import jax

from maxconv.sources.orbax import Item
from maxconv.targets.lazy import LazyTensor


@dataclass
class Progress:
    """The progress of a save in this process: bytes written and held, and finished leaves."""

    total: int = 0
    written: int = 0
    leaves: int = 0
    held: int = 0
    peak_held: int = 0
    begun: Event = field(default_factory=Event)
    """Set once Orbax has started the save, with collectives of its own, on the main thread."""

    def hold(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak_held = max(self.peak_held, self.held)


class Target(ABC):
    """A place that arrays are written to, slab by slab, and where all of them appear at once.

    All processes call `begin`, `write` and `commit`, in this order.

    Attributes:
        place: the path or URL that the user gave.
        directory: where Orbax writes.
    """

    place: str
    directory: str

    @abstractmethod
    def begin(self, record: Mapping[str, Any], resume: bool) -> tuple[Set[str], tuple[str, ...]]:
        """Prepares the place, and stores `record` there for a later --resume.

        Args:
            record: how the arrays are made; JSON-serializable.
            resume: keep the arrays that an earlier attempt finished.

        Returns:
            The names of the arrays that are kept, equal on all processes, and notices for the user.

        Raises:
            UserError: the place cannot be used after all.
        """

    @abstractmethod
    def write(self, arrays: Mapping[str, LazyTensor | jax.Array], progress: Progress) -> None:
        """Makes and writes all arrays but those that were kept; returns when they are durable."""

    @abstractmethod
    def commit(self, record: Mapping[str, Any]) -> None:
        """Makes the checkpoint appear, with `record` next to it."""

    @abstractmethod
    def saved(self, item: Item) -> Item:
        """The committed checkpoint, for reading it back; `item` is what Orbax wrote."""

    def close(self) -> None:
        """Releases locks and removes scratch files."""
        return
