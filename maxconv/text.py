"""Text for people: what comes from files and servers is shown as it is, and cannot do anything."""

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
