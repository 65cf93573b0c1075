"""What is found out about shardings once, and kept until a job forgets it: it holds meshes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

_empty: list[Callable[[], None]] = []  # the caches

if TYPE_CHECKING:
    remembered = cache
else:

    def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
        """`functools.cache`, emptied by `forgetting`."""
        cached = cache(function)
        _empty.append(cached.cache_clear)
        return cached


@contextmanager
def forgetting() -> Iterator[None]:
    """Empties the caches of all functions that are remembered, when the block ends."""
    try:
        yield
    finally:
        for empty in _empty:
            empty()
