"""Errors, and how they are printed."""

import traceback
from collections.abc import Sequence

from maxconv.text import printable, printable_lines

_MANY = 20  # problems that are printed


class ConversionError(Exception):
    """An error that is reported to the user in plain sentences, without a traceback.

    Each problem is one sentence that names its subject and says what to do; all problems that were
    found are reported together. The process exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))


class UserError(ConversionError):
    """Bad input, found before any byte was written."""

    exit_code = 2


class RetryableError(ConversionError):
    """The same command may succeed later: a host was preempted, or a server was overloaded."""

    exit_code = 42  # on which xpk restarts a workload


class VerificationError(ConversionError):
    """A checkpoint differs from its source; each problem is a sentence about one leaf."""

    def __init__(self, checkpoint: str, problems: Sequence[str]):
        super().__init__(
            (f"{checkpoint} differs from its source; do not train from it.", *problems)
        )


def cause(error: BaseException) -> BaseException:
    """The first of the errors in an exception group, as tasks and threads pass them on."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def exit_code(error: BaseException) -> int:
    """The exit code of a process after an error."""
    error = cause(error)
    if isinstance(error, ConnectionError | TimeoutError):
        return RetryableError.exit_code
    return error.exit_code if isinstance(error, ConversionError) else ConversionError.exit_code


def problems_text(problems: Sequence[str]) -> str:
    """Problems, one per line; a long list is truncated, and so is a long problem."""
    sentences = (p if p.endswith("?") else f"{p.rstrip('.')}." for p in problems[:_MANY])
    lines = [f"maxconv: {printable(sentence)}" for sentence in sentences]
    if len(problems) > _MANY:
        lines.append(f"maxconv: and {len(problems) - _MANY} more like these.")
    return "\n".join(lines)


def failure_text(error: BaseException) -> str:
    """The cause of a failure in the middle of a conversion, as text.

    With a traceback, except for errors of the operating system or of TensorStore: there the place
    in the program does not help.
    """
    error = cause(error)
    if isinstance(error, ConversionError):
        return problems_text(error.problems)
    said = str(error) or type(error).__name__
    failed = printable_lines(f"maxconv: failed: {said}")
    if isinstance(error, OSError) or "[os_error_code=" in said:  # the latter is TensorStore's
        return failed
    return printable_lines("".join(traceback.format_exception(error))) + failed
