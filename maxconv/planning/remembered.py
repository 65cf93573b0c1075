"""What is found out about shardings once, and kept until a job forgets it: it holds meshes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

_Result = TypeVar("_Result")
_caches: list[_lru_cache_wrapper[Any]] = []


def remembered(function: Callable[..., _Result]) -> _lru_cache_wrapper[_Result]:
    """`functools.cache`, emptied by `forget`."""
    cached = cache(function)
    _caches.append(cached)
    return cached


@contextmanager
def forgetting() -> Iterator[None]:
    """Empties the caches of all functions that are remembered, when the block ends."""
    try:
        yield
    finally:
        for cached in _caches:
            cached.cache_clear()
