"""Reports a job on a terminal, while it runs and when it is done."""

import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import jax

from maxconv.cli.progress import ProgressLine
from maxconv.cli.training_command import training_command
from maxconv.execution.memory import peak_memory
from maxconv.jobs.prepare import Job
from maxconv.jobs.reporter import Reporter
from maxconv.text import duration, note, say, size


class TerminalReporter(Reporter):
    """Notes and progress go to stderr, results to stdout; only process 0 prints."""

    def __init__(self) -> None:
        self._speaks = jax.process_index() == 0

    def note(self, text: str) -> None:
        if self._speaks:
            note(text)

    def progress(
        self, label: str, done: Callable[[], tuple[int, int]]
    ) -> AbstractContextManager[object]:
        return ProgressLine(label, done, sys.stderr if self._speaks else None)

    def saved(self, job: Job, seconds: float) -> None:
        if self._speaks:
            say(_summary(job, seconds))

    def verified(self, job: Job, leaves: int, witnessed: int, seconds: float) -> None:
        if self._speaks:
            say(
                f"verified {leaves} of {len(job.plan.leaves)} leaves bit for bit against the "
                f"source, {size(witnessed)} also with an independent numpy check, in "
                f"{duration(seconds)}"
            )

    def exported(
        self, directory: str, tensors: int, files: int, nbytes: int, seconds: float
    ) -> None:
        if self._speaks:
            say(
                f"{tensors} tensors, {size(nbytes)} in {duration(seconds)} "
                f"({size(nbytes / seconds)}/s); peak RSS {size(peak_memory())}\n"
                f"saved: {directory}, {files} file(s) of weights"
            )

    def compared(self, tensors: int, of: int, nbytes: int, seconds: float) -> None:
        if self._speaks:
            say(
                f"verified {tensors} of {of} tensors, {size(nbytes)}, bit for bit against what "
                f"numpy makes of the checkpoint, in {duration(seconds)}"
            )

    def traced(self, path: str, seconds: Mapping[str, float]) -> None:
        if self._speaks:
            parts = (f"{kind} {duration(spent)}" for kind, spent in seconds.items())
            say(
                f"time, summed over threads: {', '.join(parts)}; timeline for ui.perfetto.dev: "
                f"{path}"
            )


def _summary(job: Job, took: float) -> str:
    plan, read, traffic = job.plan, job.source.stats.bytes_read, job.source.traffic
    if job.there == "finished":
        return f"already saved by an earlier run: {job.items}"
    moved = f", transferred {size(traffic.nbytes)} in {traffic.requests} requests" * bool(
        traffic.requests
    )
    command = training_command(job)
    how = f"\nto train from it in MaxText, with your data and steps: {command}" * (
        command is not None
    )
    return (
        f"{len(plan.leaves)} leaves, {size(plan.output_nbytes)} in {duration(took)} "
        f"({size(plan.output_nbytes / took)}/s); this process read {size(read)}{moved}; "
        f"peak RSS {size(peak_memory())}\nsaved: {job.items}"
    ) + how
