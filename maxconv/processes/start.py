"""Starts JAX: the platform, the simulated devices and the other processes, before any array."""

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from glob import glob
from importlib import metadata

import maxconv
from maxconv.config import Config, parse, those_of
from maxconv.errors import ConversionError, RetryableError, UserError
from maxconv.processes import coordinator, liveness, roll_call
from maxconv.processes.agreement import agree
from maxconv.processes.roll_call import Processes
from maxconv.text import note

PORT = 1234  # of a coordinator that is named without one, as MaxText has it
_JOINS = 60  # seconds for all processes, when they have met, to join JAX's service
_WAITS = 30  # seconds that a process waits for the others only to tell them that it cannot go on
_OF_MEETING = (
    "hardware",
    "coordinator_address",
    "num_processes",
    "process_id",
    "skip_jax_distributed_system",
    "jax_distributed_initialization_timeout",
    "tpu_type",
)


def initialize(config: Config, command: str = "") -> tuple[str, ...]:
    """Sets JAX up as `config` says; returns what the user should be told.

    Call it first: it has no effect on a backend that already runs.

    Args:
        config: where the other processes are, and what all of them must have been told.
        command: of maxconv, that all processes must have been given.

    Raises:
        UserError: processes were told different things, or one cannot go on; on all of them.
        RetryableError: a process did not come; on all that did.
    """
    notices: tuple[str, ...] = ()
    if config.tpu_type is not None:  # a plan for devices that are not here needs none
        _use_cpu(1)
        return notices
    platform = _platform(config)
    if platform == "cpu" and config.hardware != "cpu":
        notices = ("No TPU is in use here: the conversion runs on the CPU, as with hardware=cpu.",)
    if platform == "cpu":
        _use_cpu(config.simulated_cpu_devices_count)
    _connect(config, platform)
    given = {"the command": command, **_releases(), "the platform": platform}
    agree({**given, **config.of_all_processes}, "start the same command on all of them")
    return notices


def refuse(arguments: Sequence[str], error: Exception) -> None:
    """Ends the processes that wait for this one, if it fails before they met.

    Args:
        arguments: of this process. Only those that say where the others are must be valid.
        error: why it cannot go on.
    """
    if roll_call.met():
        return
    try:
        config = parse(those_of(arguments, _OF_MEETING))
        to = None if config.tpu_type else find_processes(config, _platform(config))
    except UserError:
        return  # where the others are is not known
    if to is not None:
        seconds = min(_WAITS, config.jax_distributed_initialization_timeout)
        note(f"process {to.mine} of {to.n} tells {to.others} {to.where} that it cannot go on")
        with suppress(ConversionError):  # this process has its own to report
            roll_call.meet(to, seconds, refused=error)


def _platform(config: Config) -> str:
    """Where arrays will be, as JAX names it."""
    if config.hardware == "cpu":
        return "cpu"
    first = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return first or ("tpu" if _has_tpu() else "cpu")


def _releases() -> dict[str, str]:
    """Releases that decide what a program, a plan or a file is."""
    names = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy", "ml_dtypes")
    return {"the release of maxconv": maxconv.__version__} | {
        f"the release of {name}": metadata.version(name) for name in names
    }


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


def find_processes(
    config: Config, platform: str, environ: Mapping[str, str] = os.environ
) -> Processes | None:
    """The processes that the flags name, else those that the environment does; None: just this.

    Raises:
        UserError: the environment says that there are others, but not which.
    """
    if config.skip_jax_distributed_system:
        return None
    if config.coordinator_address is not None:
        assert config.num_processes is not None and config.process_id is not None
        found = Processes(config.coordinator_address, config.num_processes, config.process_id)
    elif platform == "tpu":
        found = _on_tpus(config.jax_distributed_initialization_timeout)
    elif "JAX_COORDINATOR_ADDRESS" in environ:
        found = _in_cpu_pool(environ)
    else:
        return None
    if found is None or found.n == 1:
        return None
    host, colon, port = found.address.rpartition(":")
    with_port = found.address if colon and port.isdigit() else f"{found.address}:{PORT}"
    return replace(found, address=with_port)


def _on_tpus(timeout: int) -> Processes | None:
    """What JAX reads of GKE's environment or the TPU VM's metadata; slices follow each other."""
    from maxconv.private.jax import clusters

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        address, count, mine, _ = detect(None, None, None, None, None, timeout)
    except Exception as error:  # of the network, of a library that is missing, of odd metadata
        raise UserError(
            f"JAX cannot tell which processes share this TPU ({error}); give "
            "--coordinator_address, --num_processes and --process_id, or "
            "skip_jax_distributed_system=true if there is one."
        ) from error
    if address is None or count is None or mine is None:
        return None
    return Processes(address, count, mine)


def _in_cpu_pool(environ: Mapping[str, str]) -> Processes:
    """What xpk sets in the pods of a pool of CPU nodes; JAX reads no more than the address."""
    names = ("JAX_PROCESS_COUNT", "JOB_INDEX", "PROCESSES_IN_JOB", "JOB_COMPLETION_INDEX")
    try:
        count, job, in_job, mine = (int(environ[name]) for name in names)
    except (KeyError, ValueError):
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS is set, but not all of {', '.join(names)} are numbers; give "
            "--coordinator_address, --num_processes and --process_id, or unset it."
        ) from None
    return Processes(environ["JAX_COORDINATOR_ADDRESS"], count, job * in_job + mine)


def _connect(config: Config, platform: str) -> None:
    """Joins the other processes, if there are any."""
    import jax

    from maxconv.private.jaxlib import _jax

    if jax.distributed.is_initialized() or not (to := find_processes(config, platform)):
        return
    timeout = config.jax_distributed_initialization_timeout
    note(
        f"process {to.mine} of {to.n} waits for {to.others} {to.where}; started on one worker "
        "only? Start it on all: gcloud takes --worker=all"
    )
    roll_call.meet(to, timeout)
    if platform == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from us
    stock = _jax.get_distributed_runtime_service
    _jax.get_distributed_runtime_service = coordinator.Service
    try:
        with _bounded(to):
            jax.distributed.initialize(
                to.address,
                to.n,
                to.mine,
                cluster_detection_method="deactivate",
                initialization_timeout=2 * _JOINS,  # after which it would abort the process
            )
    finally:
        _jax.get_distributed_runtime_service = stock
    liveness.watch()


@contextmanager
def _bounded(to: Processes) -> Iterator[None]:
    """Ends this process if JAX cannot join the others, although all have met."""

    def give_up() -> None:
        liveness.fail(
            RetryableError(
                f"Process {to.mine} of {to.n} could not join the others {to.where} within "
                f"{_JOINS} s: one of them was killed since they met, or its host was taken away."
            )
        )

    timer = threading.Timer(_JOINS, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
