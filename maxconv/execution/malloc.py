"""Keeps memory that was freed for what comes next, but not too much of it."""

import ctypes
import sys
from functools import cache
from typing import Any

from maxconv.execution.memory import host_memory

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 32 << 20  # bytes: the most that glibc takes for a threshold
_KEPT = 1 << 30


def keep_freed() -> None:
    """Lets glibc serve blocks of up to 32 MiB from memory that this process had before.

    By itself it returns each to the kernel and gets the next page by page, which a conversion, that
    frees as much as it allocates, would do a million times in 4 GiB: a third of its time where a
    virtual machine has to ask its host for the pages. One arena, as each would keep its own.
    Elsewhere than on Linux, or with another allocator, nothing happens.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim(above: int = 0) -> None:
    """Returns what was freed to the kernel, if this process has more than so many bytes.

    Blocks of many sizes leave gaps that no next one fits into, and these add up.
    """
    if (libc := _glibc()) is not None and host_memory() > above:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library, if it is one that can be told how to keep memory."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError):
        return None
