"""Two processes of one conversion, one of which fails: both end, soon and with the cause told once.

Each is stopped where it should fail by a pause, and goes from there by a signal or an error.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import MESHES
from orbax.checkpoint import v1 as ocp
from test_processes import processes, said

BOUND = 30  # seconds in which all processes end
PROGRAM = """
import os, sys, time
from pathlib import Path
from maxconv import cli
from maxconv.jobs import prepare as job
from maxconv.sources import LocalSource
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import ocdbt_utils

OF = {
    "before planning": (job, "make_plan", 1),
    "reading": (LocalSource, "_fetch", 8),
    "committing": (ocdbt_utils, "merge_ocdbt_per_process_files", 1),
    "renaming": (atomicity.AtomicRenameTemporaryPath, "finalize", 2),  # after that of items
}
owner, name, nth = OF[os.environ["STAGE"]]
function, calls = getattr(owner, name), []

def paused(*args, **kwargs):
    calls.append(name)
    if len(calls) == nth:
        (marks := Path(os.environ["MARKS"])).mkdir(exist_ok=True)
        (marks / str(os.getpid())).touch()
        if os.environ.get("FAIL") == sys.argv[-1]:
            raise OSError(28, "No space left on device", "disk")
        time.sleep(3 if os.environ.get("FAIL") else 100)
    return function(*args, **kwargs)

setattr(owner, name, paused)
sys.exit(cli.main(["convert", *sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Case:
    """Process `victim` goes at a stage, by a signal or (None) an error; `said` is the cause."""

    stage: str
    victim: int
    by: signal.Signals | None
    codes: tuple[int, int]
    said: str


GONE = "disappeared without a message: it was killed, ran out of memory, or its host was preempted"
CASES = [
    Case("before planning", 0, signal.SIGKILL, (-9, 42), f"process 0 {GONE}"),
    Case("before planning", 1, signal.SIGTERM, (42, 42), "terminated (SIGTERM)"),
    Case("reading", 1, signal.SIGKILL, (42, -9), f"process 1 {GONE}"),
    Case("reading", 1, None, (1, 1), "No space left on device"),
    Case("committing", 0, signal.SIGKILL, (-9, 42), f"process 0 {GONE}"),
    Case("committing", 0, None, (1, 1), "No space left on device"),
    Case("renaming", 0, None, (1, 1), "No space left on device"),
    Case("renaming", 1, signal.SIGKILL, (42, -9), f"process 1 {GONE}"),
]
USUAL = CASES[1:2]


@dataclass(frozen=True)
class Outcome:
    codes: list[int]
    seconds: float
    logs: list[str]
    again: list[int]
    logs_again: list[str]
    left: list[str]
    loads: bool


def run(case: Case, directory: Path) -> Outcome:
    model, out = tiny.write("llama3.1-8b", directory / "hf"), directory / "out"
    words = [
        *tiny.maxtext_words("llama3.1-8b", True),
        *MESHES["fsdp8"],
        "hardware=cpu",
        f"--hf_model_path={model}",
        f"base_output_directory={out}",
        "--verify=none",
    ]
    marks = directory / "marks"
    failing = {"STAGE": case.stage, "MARKS": str(marks)}
    if case.by is None:
        failing["FAIL"] = f"--process_id={case.victim}"
    at_one = case.stage in ("committing", "renaming")  # process 0 does it
    with processes(2, words, directory / "logs", PROGRAM, failing) as running:
        pids = {str(p.pid) for p in (running[:1] if at_one else running)}
        until = time.monotonic() + 100
        while not marks.exists() or not pids <= {path.name for path in marks.iterdir()}:
            assert time.monotonic() < until and all(p.poll() is None for p in running), said(
                directory / "logs"
            )
            time.sleep(0.05)
        began = time.monotonic()
        if case.by is not None:
            running[case.victim].send_signal(case.by)
        codes = [process.wait(timeout=2 * BOUND) for process in running]
        seconds = time.monotonic() - began
    loads = (out / "0").exists()
    if out.exists():
        with ocp.training.Checkpointer(str(out)) as checkpointer:
            loads = loads or checkpointer.latest is not None
    with processes(2, words, directory / "again") as running:
        again = [process.wait(timeout=100) for process in running]
    left = sorted(path.name for path in out.iterdir())
    shutil.rmtree(out)
    logs, logs_again = said(directory / "logs"), said(directory / "again")
    return Outcome(codes, seconds, logs, again, logs_again, left, loads)


def parameters() -> Iterator[Any]:
    """Of each way to go one case; CI has the others, too."""
    for case in CASES:
        name = f"{case.stage}-{case.victim}-{case.by or 'error'}"
        yield pytest.param(case, id=name, marks=[] if case in USUAL else pytest.mark.slow)


@pytest.mark.parametrize("case", [*parameters()])
def test_all_end_together(case: Case, tmp_path: Path) -> None:
    outcome = run(case, tmp_path)
    told = "\n".join(outcome.logs)
    assert tuple(outcome.codes) == case.codes, told
    assert outcome.seconds < BOUND, told
    assert told.count(case.said) == 1 and "Traceback" not in told, told
    assert told.count("nothing was saved") <= 1
    assert not outcome.loads
    assert outcome.again == [0, 0], "\n".join(outcome.logs_again)
    assert outcome.left == ["0", "maxconv.json"]


def test_nobody_else_comes() -> None:
    """Says whom it waits for before it waits, and the usual mistake after."""
    words = ["--coordinator_address=127.0.0.1:1", "--num_processes=4", "--process_id=2"]
    words += ["hardware=cpu", "jax_distributed_initialization_timeout=2"]
    done = subprocess.run(
        [sys.executable, "-m", "maxconv.cli", "plan", *words],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    before, *after = done.stderr.splitlines()
    assert done.returncode == 42
    assert before.startswith("note: process 2 of 4 waits for process 0 at 127.0.0.1:1")
    assert after[0].startswith("maxconv: Process 2 of 4 waited 2.0s in vain for process 0")
    assert "--worker=all" in after[0]
