"""Sizes, durations and tables as people read them."""

from collections.abc import Iterable, Sequence


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
    cells = [[str(cell) for cell in row] for row in ((header, *rows) if header else rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [
        bool(header) and all(cell[:1].isdigit() for cell in column[1:])
        for column in zip(*cells, strict=True)
    ]

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in columns).rstrip()

    return "\n".join(map(line, cells))
