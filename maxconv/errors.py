"""Errors, and how they are told to a person."""

import traceback
from collections.abc import Sequence

from maxconv.text import printable, printable_lines

_MANY = 20  # problems that are worth reading one by one


class ConversionError(Exception):
    """What a person is told in sentences, without a traceback.

    Each problem is one sentence that names the thing and says what to do; all problems that were
    found are reported at once. The process ends with `exit_code`.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class UserError(ConversionError):
    """Bad input, found before any byte was written."""

    exit_code = 2


class RetryableError(ConversionError):
    """The same command may well succeed later: a host was taken away, a server had enough."""

    exit_code = 42  # on which xpk starts a workload again


class VerificationError(ConversionError):
    """A checkpoint is not what its source makes; each problem is a sentence about one leaf."""

    def __init__(self, checkpoint: str, problems: Sequence[str]):
        super().__init__((f"{checkpoint} is wrong; do not train from it.", *problems))


def cause(error: BaseException) -> BaseException:
    """The error that began it, of a group that tasks and threads passed on."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def exit_code(error: BaseException) -> int:
    """What a process ends with after an error."""
    error = cause(error)
    if isinstance(error, ConnectionError | TimeoutError):
        return RetryableError.exit_code
    return error.exit_code if isinstance(error, ConversionError) else ConversionError.exit_code


def problems_text(problems: Sequence[str]) -> str:
    """Problems, one a line; a long list is cut, and so is a long problem."""
    lines = [f"maxconv: {printable(p.rstrip('.'))}." for p in problems[:_MANY]]
    if len(problems) > _MANY:
        lines.append(f"maxconv: and {len(problems) - _MANY} more like these.")
    return "\n".join(lines)


def failure_text(error: BaseException) -> str:
    """What went wrong in the middle of a conversion: its cause, without those who passed it on.

    With a traceback, unless it is the system's: then where in the program it was says nothing.
    """
    error = cause(error)
    if isinstance(error, ConversionError):
        return problems_text(error.problems)
    said = str(error) or type(error).__name__
    failed = printable_lines(f"maxconv: failed: {said}")
    if isinstance(error, OSError) or "[os_error_code=" in said:  # the latter is TensorStore's
        return failed
    return printable_lines("".join(traceback.format_exception(error))) + failed
