"""Processes that were told different things say so, on all of them, before anything is written."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny
from jobs import MESHES
from test_processes import processes, said

PROGRAM = """
import os, sys
import maxconv
from maxconv import cli
if os.environ.get("OTHER_RELEASE") == sys.argv[-1]:
    maxconv.__version__ = "0.0.1"
command, own = "convert", []
if "COPY_OF_PROCESS_1" in os.environ and sys.argv[-1] == "--process_id=1":
    from maxconv.jobs import prepare
    opened = prepare.open_source
    prepare.open_source = lambda path, *a, **k: opened(os.environ["COPY_OF_PROCESS_1"], *a, **k)
if sys.argv[-1] == "--process_id=1":
    own = os.environ.get("OF_PROCESS_1", "").split()
    command = os.environ.get("COMMAND_OF_PROCESS_1", command)
sys.exit(cli.main([command, *sys.argv[1:-3], *own, *sys.argv[-3:]]))
"""


@dataclass(frozen=True)
class Case:
    """Arguments of process 1 alone, and what all say of them."""

    of_process_1: str
    problem: str
    environ: Mapping[str, str] = field(default_factory=dict)


CASES = [
    Case(
        "--no_such_option=1", "(Process 1 cannot go on: |^maxconv: )--no_such_option is not a flag"
    ),
    Case(
        "--save_dtype=float32 scan_layers=false checkpoint_storage_use_zarr3=false",
        "scan_layers is True on process 0 and False on process 1.*"
        "checkpoint_storage_use_zarr3 is True on process 0 and False on process 1.*"
        "save_dtype is bfloat16 on process 0 and float32 on process 1; start the same command",
    ),
    Case(
        "base_output_directory={}/elsewhere",
        "base_output_directory is .*/out on process 0 and .*/elsewhere on process 1",
    ),
    Case(
        "ici_fsdp_parallelism=4 ici_tensor_parallelism=2 --simulated_cpu_devices_count=2",
        "simulated_cpu_devices_count is 4 on process 0 and 2 on process 1.*"
        "ici_fsdp_parallelism is 8 on process 0 and 4 on process 1",
    ),
    Case(
        "",
        "the release of maxconv is .* on process 0 and 0.0.1 on process 1",
        {"OTHER_RELEASE": "--process_id=1"},
    ),
    Case(
        "",
        "the command is convert on process 0 and plan on process 1",
        {"COMMAND_OF_PROCESS_1": "plan"},
    ),
]


def run(directory: Path, environ: Mapping[str, str], more: Sequence[str] = ()) -> list[str]:
    """What two processes say that end with 2, soon, and write nothing."""
    model = tiny.write("llama3.1-8b", directory / "hf")
    words = [*tiny.maxtext_words("llama3.1-8b", True), *MESHES["fsdp8"], "hardware=cpu"]
    words += [f"--hf_model_path={model}", f"base_output_directory={directory}/out", *more]
    began = time.monotonic()
    with processes(2, words, directory / "logs", PROGRAM, environ) as running:
        codes = [process.wait(timeout=100) for process in running]
    logs = said(directory / "logs")
    assert codes == [2, 2] and time.monotonic() - began < 90, "\n".join(logs)
    assert not (directory / "out").exists() and not (directory / "elsewhere").exists()
    return logs


@pytest.mark.parametrize(
    "case",
    [*CASES[:2], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[2:])],
    ids=lambda case: case.problem[:30],
)
def test_told_differently(case: Case, tmp_path: Path) -> None:
    environ = {"OF_PROCESS_1": case.of_process_1.format(tmp_path), **case.environ}
    for log in run(tmp_path, environ):
        assert re.search(case.problem, log.replace("\n", " ")) and "Traceback" not in log, log


def test_another_copy_of_the_source(tmp_path: Path) -> None:
    """Of the same shapes and names, with other values: on a disk of its own under the same path."""
    other = tiny.write("llama3.1-8b", tmp_path / "other")
    file = sorted(other.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for log in run(tmp_path, {"COPY_OF_PROCESS_1": str(other)}):
        assert re.search(f"the content of {file.name} is .* on process 0 and .* on process 1", log)
        assert log.count("the content of") == 1 and "Traceback" not in log
