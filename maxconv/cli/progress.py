"""Progress on a terminal or in a log."""

import os
import threading
import time
from collections.abc import Callable
from typing import Self, TextIO

from maxconv.execution.memory import host_memory
from maxconv.text import duration, percent, size

INTERVAL_ON_TERMINALS = 0.5  # seconds between two updates
INTERVAL_IN_LOGS = 10


class ProgressLine:
    """Prints how far a conversion is: one line that moves on a terminal, a line now and then else.

    Args:
        label: what is being done.
        done: gives bytes done so far and in all.
        out: where to; None keeps quiet.
    """

    def __init__(self, label: str, done: Callable[[], tuple[int, int]], out: TextIO | None):
        self._label, self._done, self._out = label, done, out
        self._live = bool(out and out.isatty())
        self._started = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(INTERVAL_ON_TERMINALS if self._live else INTERVAL_IN_LOGS):
            assert self._out is not None
            if self._live:  # cut to one row, else \r would not come back to its beginning
                columns = os.get_terminal_size(self._out.fileno()).columns or 80
                self._out.write(f"\r{self._text()[: columns - 1]}\x1b[K")
            else:
                self._out.write(self._text() + "\n")
            self._out.flush()

    def _text(self) -> str:
        done, total = self._done()
        rate = done / (time.monotonic() - self._started)
        known = done and 100 * done >= total  # before, the time that is left is a wild guess
        pace = f", {size(rate)}/s, {duration((total - done) / rate)} left" if known else ""
        return (
            f"{self._label} {size(done)} of {size(total)} ({percent(done, total)}){pace}, "
            f"memory {size(host_memory())}"
        )

    def __enter__(self) -> Self:
        if self._out is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._live and self._out is not None:
            self._out.write("\r\x1b[K")
            self._out.flush()
