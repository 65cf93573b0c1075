"""The interface through which a job reports; by default, silent."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

from maxconv.jobs.prepare import Job


class Reporter:
    """Receives what happens in a job, on every process. Subclasses show it to the user."""

    def note(self, text: str) -> None:
        """A notice for the user; the job goes on."""

    def progress(
        self, label: str, done: Callable[[], tuple[int, int]]
    ) -> AbstractContextManager[object]:
        """Progress of a long operation. `done` returns the bytes done so far, and in all."""
        return nullcontext()

    def saved(self, job: Job, seconds: float) -> None:
        """A checkpoint was saved, in so many seconds."""

    def verified(self, job: Job, leaves: int, witnessed: int, seconds: float) -> None:
        """A number of leaves were compared with the source, and are correct.

        `witnessed`: bytes of leaves that were also checked with numpy (see witness.py).
        """

    def exported(
        self, directory: str, tensors: int, files: int, nbytes: int, seconds: float
    ) -> None:
        """A Hugging Face checkpoint was written."""

    def compared(self, tensors: int, of: int, nbytes: int, seconds: float) -> None:
        """Some of the tensors that were exported, so many bytes of them, are what numpy makes."""

    def traced(self, path: str, seconds: Mapping[str, float]) -> None:
        """A timeline was written; `seconds`: for each kind of work, summed over all threads."""
