"""Each case starts its own Python: a JAX backend is set up once in a process."""

import os
import socket
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from maxconv import distributed
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


def test_processes() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    line = f"hardware=cpu simulated_cpu_devices_count=2 coordinator_address={address}"
    both = [start(f"{line} --num_processes=2 --process_id={i}") for i in range(2)]
    assert [result(process) for process in both] == ["cpu 2 4 0"] * 2
