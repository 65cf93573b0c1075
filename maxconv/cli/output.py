"""Standard output and error, which nobody may be reading: that changes no exit code."""

import io
import os
import sys
from typing import Any, TextIO, cast


class Output:
    """A text stream whose reader may go away, or whose disk may be full: the rest is dropped."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (OSError, ValueError):
            self._drop()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._drop()

    def _drop(self) -> None:
        self._lost = self._stream  # kept, as its end would try to write once more
        self._stream = open(os.devnull, "w")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_outputs() -> None:
    """Makes the outputs of this process such streams, and occupies descriptors that are closed.

    A file that is opened later would be written to in their stead.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, cast(TextIO, Output(stream)))
