"""What a job needs of the place where its arrays go."""

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
    """How far a save is, in this process. `written` and `total` are bytes of finished leaves."""

    total: int = 0
    written: int = 0
    leaves: int = 0
    held: int = 0
    peak_held: int = 0
    begun: Event = field(default_factory=Event)
    """Set when Orbax has begun, on the main thread and with collectives: ours may follow."""

    def hold(self, nbytes: int) -> None:
        self.held += nbytes
        self.peak_held = max(self.peak_held, self.held)


class Target(ABC):
    """A place that is told all arrays beforehand, is given their slabs as they are made, and makes
    all of them appear at once.

    All processes call `begin`, `write` and `commit`, in this order.

    Attributes:
        place: as the user named it.
        directory: where Orbax writes.
    """

    place: str
    directory: str

    @abstractmethod
    def begin(self, record: Mapping[str, Any], resume: bool) -> tuple[Set[str], tuple[str, ...]]:
        """Makes the place ready, and leaves `record` there for another attempt.

        Args:
            record: how the arrays are made, as JSON has it.
            resume: keep the arrays that an attempt before this one finished.

        Returns:
            The names of these arrays, the same on all processes, and notices for the user.

        Raises:
            UserError: when the place cannot be used after all.
        """

    @abstractmethod
    def write(self, arrays: Mapping[str, LazyTensor | jax.Array], progress: Progress) -> None:
        """Takes all arrays, by name, and makes those that it does not have. Returns when they are
        durable."""

    @abstractmethod
    def commit(self, record: Mapping[str, Any]) -> None:
        """Makes what was written appear, with `record` beside it."""

    @abstractmethod
    def saved(self, item: Item) -> Item:
        """What was committed, to be read back, of what Orbax wrote here."""

    def close(self) -> None:
        """Removes what is left on this machine of a target elsewhere."""
        return
