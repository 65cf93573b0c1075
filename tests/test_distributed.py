"""Each case starts its own Python: a JAX backend is set up once in a process."""

import os
import socket
import subprocess
import sys

import pytest

from maxconv.config import parse
from maxconv.errors import UserError
from maxconv.processes.start import Processes, find_processes

PROGRAM = """
import sys
from maxconv.processes import start as distributed
from maxconv.config import parse
notices = distributed.initialize(parse(sys.argv[1:], {}))
import jax
print(jax.default_backend(), jax.process_count(), jax.device_count(), len(notices))
"""


def start(line: str, **environ: str) -> "subprocess.Popen[str]":
    unset = ("JAX_PLATFORMS", "XLA_FLAGS")
    env = {key: value for key, value in os.environ.items() if key not in unset} | environ
    command = [sys.executable, "-c", PROGRAM, *line.split()]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE)


def result(process: "subprocess.Popen[str]") -> str:
    with process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return output.strip()


@pytest.mark.parametrize(
    ("line", "environ", "expected"),
    [
        ("hardware=cpu", {}, "cpu 1 16 0"),
        ("--simulated_cpu_devices_count=3", {"JAX_PLATFORMS": "cpu"}, "cpu 1 3 1"),
        (
            "hardware=cpu",
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"},
            "cpu 1 5 0",
        ),
    ],
)
def test_cpu(line: str, environ: dict[str, str], expected: str) -> None:
    assert result(start(line, **environ)) == expected


def test_processes_of_a_cpu_pool() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    line = "hardware=cpu simulated_cpu_devices_count=2"
    both = [start(line, **pool(address, jobs=1, in_job=2, job=0, mine=i)) for i in range(2)]
    assert [result(process) for process in both] == ["cpu 2 4 0"] * 2


def pool(address: str, jobs: int, in_job: int, job: int, mine: int) -> dict[str, str]:
    """What xpk sets in a pod of a pool of CPU nodes."""
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_PROCESS_COUNT": str(jobs * in_job),
        "PROCESSES_IN_JOB": str(in_job),
        "JOB_INDEX": str(job),
        "JOB_COMPLETION_INDEX": str(mine),
    }


def test_finds_the_processes_of_a_cpu_pool() -> None:
    environ = pool("head.pod", jobs=3, in_job=4, job=2, mine=1)
    cpu = parse(["hardware=cpu"], {})
    assert find_processes(cpu, "cpu", environ) == Processes("head.pod:1234", 12, 9)
    assert find_processes(cpu, "cpu", {}) is None
    assert find_processes(parse(["skip_jax_distributed_system=true"], {}), "cpu", environ) is None
    with pytest.raises(UserError, match="JAX_PROCESS_COUNT.*--num_processes"):
        find_processes(cpu, "cpu", {"JAX_COORDINATOR_ADDRESS": "head.pod"})


GKE = {"TPU_WORKER_HOSTNAMES": "127.0.0.1,127.0.0.2,127.0.0.3,127.0.0.4", "TPU_WORKER_ID": "3"}
NO_SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "", "MEGASCALE_NUM_SLICES": ""}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.9:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("environ", "found"),
    [
        (GKE | NO_SLICES | {"MEGASCALE_SLICE_ID": ""}, Processes("127.0.0.1:8482", 4, 3)),
        (GKE | SLICES, Processes("127.0.0.9:8482", 8, 7)),
        (GKE | SLICES | {"JAX_COORDINATOR_PORT": "99"}, Processes("127.0.0.9:99", 8, 7)),
    ],
)
def test_finds_the_processes_of_slices(
    environ: dict[str, str], found: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JAX looks for them only where it found chips: it is told that it did."""
    monkeypatch.setattr("jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_processes(parse([], {}), "tpu") == found
    one = ["--coordinator_address=h:1", "--num_processes=2", "--process_id=1"]
    assert find_processes(parse(one, {}), "tpu") == Processes("h:1", 2, 1)
