"""What a job tells whoever started it; by default, nothing."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from maxconv.jobs.prepare import Job


class Reporter:
    """Told what happens in a job, on every process. Subclasses show it to a person."""

    def note(self, text: str) -> None:
        """Something that the user should know; it stops nothing."""

    def progress(
        self, label: str, done: Callable[[], tuple[int, int]]
    ) -> AbstractContextManager[object]:
        """Something that takes a while. `done` gives bytes done so far, and in all."""
        return nullcontext()

    def saved(self, job: Job, seconds: float) -> None:
        """A checkpoint is saved."""

    def verified(self, job: Job, leaves: int, witnessed: int, seconds: float) -> None:
        """So many leaves of a checkpoint were compared with the source, and are right.

        `witnessed`: bytes of them that numpy made, too.
        """

    def traced(self, path: str, seconds: Mapping[str, float]) -> None:
        """A timeline was written; seconds of each kind of work, over all threads."""
