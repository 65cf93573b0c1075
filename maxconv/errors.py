"""Errors, and how they are told to a person."""

import traceback
from collections.abc import Sequence

_MANY = 20  # problems that are worth reading one by one


class UserError(Exception):
    """Bad input, found before any byte was written.

    Commands print it without a traceback and exit with 2. Each problem is one sentence that names
    the thing and says what to do; all problems that were found are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class VerificationError(Exception):
    """A checkpoint is not what its source makes; each problem is a sentence about one leaf."""

    def __init__(self, checkpoint: str, problems: Sequence[str]):
        self.problems = (f"{checkpoint} is wrong; do not train from it.", *problems)
        super().__init__("\n".join(self.problems))


def problems_text(problems: Sequence[str]) -> str:
    """Problems, one a line; a long list is cut."""
    lines = [f"maxconv: {p.rstrip('.')}." for p in problems[:_MANY]]
    if len(problems) > _MANY:
        lines.append(f"maxconv: and {len(problems) - _MANY} more like these.")
    return "\n".join(lines)


def failure_text(error: BaseException) -> str:
    """What went wrong in the middle of a conversion: its cause, without those who passed it on.

    With a traceback, unless it is the system's: then where in the program it was says nothing.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    said = str(error) or type(error).__name__
    if isinstance(error, OSError) or "[os_error_code=" in said:  # the latter is TensorStore's
        return f"maxconv: failed: {said}"
    return "".join(traceback.format_exception(error)) + f"maxconv: failed: {said}"
