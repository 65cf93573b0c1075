"""The errors that are told without a traceback."""

from collections.abc import Sequence


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
