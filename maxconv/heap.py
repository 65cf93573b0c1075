"""Keeps memory that was freed for what comes next."""

import ctypes
import sys

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
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(_M_ARENA_MAX, 1)
    mallopt(_M_MMAP_THRESHOLD, _LARGE)
    mallopt(_M_TRIM_THRESHOLD, _KEPT)
