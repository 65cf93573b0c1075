"""Records what each thread spends its time on, for `--trace` and the benchmarks.

Nothing is recorded outside of `recorded`.
"""

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from maxconv.text import MARK

KINDS = ("read", "to device", "compile", "compute", "to host", "write", "upload", "wait")


@dataclass(frozen=True)
class Span:
    """One piece of work: start and end in seconds since recording began, and the bytes it moved."""

    kind: str
    name: str
    thread: str
    start: float
    end: float
    nbytes: int


class Timeline:
    """The spans of this process so far."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.spans: list[Span] = []  # appending is atomic

    def seconds(self) -> dict[str, float]:
        """Seconds of each kind of work, summed over all threads."""
        total: dict[str, float] = defaultdict(float)
        for span in self.spans:
            total[span.kind] += span.end - span.start
        return {kind: total[kind] for kind in KINDS if kind in total}

    def write(self, path: str | os.PathLike[str], process: int = 0) -> None:
        """Writes a file in Chrome's trace format, for ui.perfetto.dev.

        It also has the start of the recording on the machine's monotonic clock.
        """
        events = [
            {
                "ph": "X",
                "pid": process,
                "tid": span.thread,
                "cat": span.kind,
                "name": f"{span.kind} {span.name}",
                "ts": span.start * 1e6,
                "dur": (span.end - span.start) * 1e6,
                "args": {"bytes": span.nbytes},
            }
            for span in self.spans
        ]
        other = {"began": self.began, "generator": MARK}
        trace = {"otherData": other, "displayTimeUnit": "ms", "traceEvents": events}
        Path(path).write_text(json.dumps(trace))


_timeline: Timeline | None = None


@contextmanager
def recorded() -> Iterator[Timeline]:
    """Records the spans of all threads while the context is active."""
    global _timeline
    before, _timeline = _timeline, Timeline()
    try:
        yield _timeline
    finally:
        _timeline = before


@contextmanager
def span(kind: str, name: str, nbytes: int = 0, thread: str | None = None) -> Iterator[None]:
    """Records work of a kind, one of `KINDS`; `thread`: its row, if not the current thread."""
    timeline = _timeline
    if timeline is None:
        yield
        return
    start = time.monotonic() - timeline.began
    try:
        yield
    finally:
        end = time.monotonic() - timeline.began
        row = thread or threading.current_thread().name
        timeline.spans.append(Span(kind, name, row, start, end, nbytes))
