"""All uses of private parts of other libraries: one module per library, each use with its reason.

Imports no other package of maxconv. tests/test_private.py checks each part against the installed
releases, and names any that a release has moved.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

TESTED = {
    "huggingface_hub": ("1.0.1", "2.4.0"),
    "jax": ("0.10.0", "0.12.0.1"),
    "orbax-checkpoint": ("0.12.4", "0.12.8"),
    "tensorstore": ("0.1.84", "0.1.86"),
}
"""The first and the last release of each library that the test suite has run with."""


def is_tested(library: str) -> bool:
    """Whether the installed release of a library lies between those that were tested."""
    first, last = map(_numbers, TESTED[library])
    return first <= _numbers(version(library)) <= last


def tested_releases(library: str) -> str:
    """The installed and the tested releases of a library, as part of a sentence."""
    first, last = TESTED[library]
    return f"{library} {version(library)} is installed, maxconv was tested with {first} to {last}"


@contextmanager
def private_parts(library: str) -> Iterator[None]:
    """Adds the tested releases to the ImportError of private parts that have moved."""
    try:
        yield
    except ImportError as error:
        releases = tested_releases(library)
        raise ImportError(f"{error}. {releases}: install one of these.") from error


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", release)))
