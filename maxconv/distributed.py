"""Starts JAX: the platform, the simulated devices and the other processes, before any array."""

import os
from glob import glob

from maxconv.config import Config


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
