"""What a process freed goes back to the kernel when it has too much, and only then."""

import subprocess
import sys

import pytest

PROGRAM = """
import numpy as np
from maxconv.execution.malloc import keep_freed, trim
from maxconv.execution.memory import host_memory

keep_freed()
blocks = [np.ones(1 << 20, np.uint8) for _ in range(400)]
kept = blocks[::40]  # between what is freed, so that the heap cannot just end earlier
held = host_memory()
del blocks
trim(above=held)
print(held - host_memory() < 64 << 20)
trim(above=held // 2)
print(held - host_memory() > 256 << 20, len(kept))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing is kept")
def test_what_was_freed_is_returned_above_a_bound() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.stdout.split("\n")[:2] == ["True", "True 10"], run.stderr
