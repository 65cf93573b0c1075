"""Starts JAX: the platform, the simulated devices and the other processes, before any array."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from typing import Any

import numpy as np

from maxconv.config import Config, parse
from maxconv.errors import UserError, exit_code, failure_text


def start(words: Sequence[str]) -> Config:
    """The config of a command line, with JAX started as it says, and the user told."""
    config = parse(words)
    notices = (*config.notices, *initialize(config))
    import jax

    if jax.process_index() == 0:
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)
    return config


def initialize(config: Config) -> tuple[str, ...]:
    """Sets JAX up as `config` says; returns what the user should be told.

    Call it first: it has no effect on a backend that already runs.
    """
    platform = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    platform = platform or ("tpu" if _has_tpu() else "cpu")
    notices: tuple[str, ...] = ()
    if config.hardware == "cpu":
        platform = "cpu"
    elif platform == "cpu":
        notices = ("No TPU is in use here: the conversion runs on the CPU, as with hardware=cpu.",)
    if platform == "cpu":
        _use_cpu(config.simulated_cpu_devices_count)
    _connect(config, platform)
    return notices


def _has_tpu() -> bool:
    """Whether a TPU's device nodes are here; asking JAX would start its backend."""
    return bool(glob("/dev/accel[0-9]*") or glob("/dev/vfio/[0-9]*"))


def _use_cpu(num_devices: int) -> None:
    import jax

    os.environ["JAX_PLATFORMS"] = "cpu"  # for what we start; this process has read it already
    try:
        jax.config.update("jax_platforms", "cpu")
        # JAX refuses both ways of counting at once: the user's own wins.
        if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
            jax.config.update("jax_num_cpu_devices", num_devices)
    except RuntimeError:
        pass  # the backend runs: its devices stay


def _connect(config: Config, platform: str) -> None:
    """Joins the other processes: those of the flags, or on a TPU those that JAX finds."""
    import jax

    if config.skip_jax_distributed_system or jax.distributed.is_initialized():
        return
    timeout = config.jax_distributed_initialization_timeout
    if config.coordinator_address is not None:
        if platform == "cpu":
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            coordinator_address=config.coordinator_address,
            num_processes=config.num_processes,
            process_id=config.process_id,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout,
        )
    elif platform == "tpu":
        jax.distributed.initialize(initialization_timeout=timeout)


@contextmanager
def same_error_everywhere() -> Iterator[None]:
    """Runs a check on every process; a UserError on any of them is raised on all."""
    mine: tuple[str, ...] = ()
    try:
        yield
    except UserError as error:
        mine = error.problems
    if problems := next(filter(None, gathered(mine)), None):
        raise UserError(problems)


def gathered(value: Any) -> list[Any]:
    """What each process has to say, as JSON has it, in the order of processes."""
    import jax

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(text.size)).max())
    width = -(-longest // 4096) * 4096  # mostly the same: compiled once
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def once(action: Callable[[], None]) -> None:
    """Does something on process 0, while the others wait for it to be done."""
    import jax

    if jax.process_index() == 0:
        action()
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("maxconv: done on process 0")


def leave_together(code: int) -> int:
    """Ends all processes with a code that they all came to; returns it if there is but one.

    A normal exit would shut JAX down behind a barrier of its own, where a process can be left
    waiting for minutes for a coordinator that is gone. So the first, where it lives, leaves last.
    """
    jax = sys.modules.get("jax")
    if jax is None or not jax.distributed.is_initialized() or jax.process_count() == 1:
        return code
    from jax._src import distributed

    client = distributed.global_state.client
    assert client is not None
    # Not a collective: it would be over here while its last bytes are still on their way there.
    client.wait_at_barrier("maxconv: leaving", timeout_in_ms=60_000)
    sys.stdout.flush()
    sys.stderr.flush()
    if jax.process_index() == 0:
        time.sleep(1)
    os._exit(code)


@contextmanager
def all_or_none() -> Iterator[None]:
    """Ends this process at once when the work inside fails and others take part in it.

    They wait for it, in a collective or at a barrier; when it is gone, JAX ends them too.
    """
    import jax

    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        print(failure_text(error), file=sys.stderr, flush=True)
        os._exit(exit_code(error))
