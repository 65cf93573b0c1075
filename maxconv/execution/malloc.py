"""Tunes glibc's malloc to reuse freed memory, but not to keep too much of it."""

import ctypes
import sys
from functools import cache
from typing import Any

from maxconv.execution.memory import host_memory

# From glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_LARGE = 32 << 20  # bytes: glibc's maximum for this threshold
_KEPT = 1 << 30


def keep_freed() -> None:
    """Makes glibc serve blocks of up to 32 MiB from memory that this process freed before.

    By default it returns each block to the kernel, and the next one is faulted in page by page: a
    million page faults per 4 GiB, which took a third of a conversion's time on a virtual machine.
    One arena only, as each would keep its own memory. Does nothing on other systems than Linux, or
    with another allocator.
    """
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_ARENA_MAX, 1)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)


def trim(above: int = 0) -> None:
    """Returns freed memory to the kernel, if this process uses more than `above` bytes.

    Counters fragmentation by blocks of many sizes.
    """
    if (libc := _glibc()) is not None and host_memory() > above:
        libc.malloc_trim(0)


@cache
def _glibc() -> Any:
    """The C library, if it is glibc (has mallopt and malloc_trim)."""
    if sys.platform != "linux":
        return None
    try:
        libc = ctypes.CDLL(None)
        return libc if libc.mallopt and libc.malloc_trim else None
    except (AttributeError, OSError):
        return None
