"""Text for people: what comes from files and servers made harmless; sizes, durations, tables."""

import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import TextIO

MARK = "written by maxconv"  # in files that a later run may overwrite
LONGEST = 2000  # characters of a sentence
LONGEST_CELL = 120  # characters of a name in a table
_MOST_LINES = 100_000


def printable(text: object, limit: int = LONGEST) -> str:
    """`text` on one line, fit for any terminal.

    What is not printable becomes an escape sequence as in Python's literals: control characters,
    which a terminal would obey, line breaks, marks that reverse the direction of writing, halves of
    surrogate pairs, which cannot be encoded. Text of more than `limit` characters is cut in the
    middle: it begins with what happened, and ends with what to do.
    """
    text = str(text)
    if len(text) > limit:
        tail = limit // 4
        left_out = len(text) - limit
        text = f"{text[: limit - tail]}[... {left_out:,} characters ...]{text[-tail:]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str, limit: int = LONGEST) -> str:
    """The same of each line of a text, which keeps its line breaks; `limit` is that of a line."""
    lines = text.split("\n", _MOST_LINES)
    return "\n".join(printable(line, limit) for line in lines)


def say(text: str, out: TextIO | None = None) -> None:
    """Prints lines, made printable, at once; on stdout if `out` says nothing else.

    Only this and `note` print, so that no text needs a thought about where it comes from.
    """
    print(printable_lines(text.removesuffix("\n")), file=out or sys.stdout, flush=True)


def note(sentence: str) -> None:
    """Tells the user on stderr something that keeps nothing from going on."""
    print(f"note: {printable(sentence)}", file=sys.stderr, flush=True)


def argument(key: str, value: object) -> str:
    """An argument of MaxText or of ours, as a shell takes it."""
    text = json.dumps(value) if isinstance(value, list) else str(value)
    return shlex.quote(f"{key}={text}")


def size(nbytes: float) -> str:
    """Bytes for people: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TiB"


def duration(seconds: float) -> str:
    """Seconds for people: 2m05s."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def percent(part: int, whole: int) -> str:
    """A part in percent of the whole: 1.5 %."""
    return f"{100 * part / whole:.1f} %" if whole else "0 %"


def table(rows: Iterable[Sequence[object]], header: Sequence[str] = ()) -> str:
    """Aligned columns; with a header, columns of numbers are aligned to the right."""
    cells = [
        [printable(cell, LONGEST_CELL) for cell in row]
        for row in ((header, *rows) if header else rows)
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [
        bool(header) and all(cell[:1].isdigit() for cell in column[1:])
        for column in zip(*cells, strict=True)
    ]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in columns).rstrip()

    return "\n".join(map(line, cells))
