"""The one error that is the user's to mend."""

from collections.abc import Sequence


class UserError(Exception):
    """Bad input, found before any byte was written.

    Commands print it without a traceback and exit with 2. Each problem is one sentence that names
    the thing and says what to do; all problems that were found are reported at once.
    """

    def __init__(self, problems: str | Sequence[str]):
        self.problems = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))
