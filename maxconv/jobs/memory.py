"""How much memory a process of a job may use."""

import jax

from maxconv.config import Config
from maxconv.execution.memory import machine_memory
from maxconv.planning.tpus import slice_of

# Default window of a process in bytes: 1/WINDOW_PART of the machine's memory, up to a size beyond
# which more does not help. Simulated CPU devices use host memory as well.
WINDOW_PART = 48
WINDOW_MOST = {"tpu": 4 << 30, "cpu": 512 << 20}
STEP_MOST = 128 << 20  # bytes per step: the TPU compiler takes minutes for much larger cells
BASE = 768 << 20  # memory of Python, JAX and Orbax themselves, as measured


def window_of(config: Config) -> int:
    """Maximum bytes that a process may hold for reading, computing and writing."""
    if config.max_host_memory_gb is not None:
        window = int(config.max_host_memory_gb * 2**30) - BASE
    elif config.tpu_type is not None:
        window = min(slice_of(config.tpu_type).machine.ram // WINDOW_PART, WINDOW_MOST["tpu"])
    else:
        return usual_window()
    return max(window, 64 << 20)


def usual_window() -> int:
    """`window_of` this machine, if nothing is said about its memory."""
    most = WINDOW_MOST.get(jax.default_backend(), WINDOW_MOST["cpu"])
    return max(min(machine_memory() // WINDOW_PART, most), 64 << 20)
