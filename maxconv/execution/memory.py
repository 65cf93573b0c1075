"""Current, peak and available memory of this process."""

import os
import resource
import sys
from pathlib import Path


def host_memory() -> int:
    """Resident bytes of this process now."""
    try:
        resident = int(Path("/proc/self/statm").read_text().split()[1])
        return resident * resource.getpagesize()
    except OSError:
        return peak_memory()


def peak_memory() -> int:
    """Peak RSS of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine_memory() -> int:
    """Memory of this machine in bytes, or the limit of this container if that is lower."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        allowed = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return there
    return min(there, int(allowed)) if allowed.isdigit() else there
