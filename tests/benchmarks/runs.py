"""Whole processes, start to exit: what they take, and what their traces hold."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 2**30


@dataclass(frozen=True)
class Run:
    """A process that is over: when it began by `time.monotonic()`, what it took and printed."""

    began: float
    seconds: float
    peak: float
    """GiB that it had in memory at most."""
    cpu: float
    """Seconds, of user and system."""
    said: str


def settled(out: Path, seconds: float = 0, source: Path | None = None) -> None:
    """Removes `out`, reads the files of `source` so that they are cached, and waits.

    On a virtual machine that reports its free pages to the host, those freed a moment ago are
    still backed. A process that begins to write at once, as cp does, gets them several times faster
    than one that imports for seconds first: 7.5 GiB were copied in 4 to 9 s, but in 17 to 20 s when
    12 s had passed, or when nothing had been freed. maxconv took the same either way.
    """
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    for path in source.iterdir() if source else ():
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass
    time.sleep(seconds)


def measured(command: Sequence[str], **environ: str) -> Run:
    """Runs a command; exits with what it said last if it fails.

    The peak is never below this process' own, as Linux counts what was there before exec: keep
    what takes memory out of it.
    """
    with tempfile.TemporaryFile() as said, tempfile.TemporaryFile() as errors:
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=said, stderr=errors, env={**os.environ, **environ}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{' '.join(command[:4])} failed:\n{_text(errors)[-3000:]}")
        cpu = usage.ru_utime + usage.ru_stime
        return Run(began, seconds, usage.ru_maxrss * 1024 / GIB, cpu, _text(said))


def read_by_each(count: int, command: Sequence[str], **environ: str) -> list[int]:
    """Bytes that each of `count` processes of one conversion reads, by its trace."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory, "trace.json")
        ours = [*command, f"--trace={trace}", f"--coordinator_address={address}"]
        each = [[*ours, f"--num_processes={count}", f"--process_id={i}"] for i in range(count)]
        with _running(each, Path(directory), environ) as processes:
            if any([process.wait() for process in processes]):
                logs = [path.read_text()[-1500:] for path in Path(directory).glob("*.log")]
                sys.exit("\n".join(["one of several processes failed:", *logs]))
        traces = [trace.with_stem(f"trace.{i}") for i in range(count)]
        return [sum(event["args"]["bytes"] for event in _reads(load(path))) for path in traces]


def first_byte(trace: Path, run: Run) -> float:
    """Seconds from the start of a process until it had the first tensor, or part of one."""
    recorded = load(trace)
    first = min(event["ts"] + event["dur"] for event in _reads(recorded)) / 1e6
    return recorded["otherData"]["began"] + first - run.began


def load(trace: Path) -> dict[str, Any]:
    return json.loads(trace.read_text())


def _reads(trace: dict[str, Any]) -> list[dict[str, Any]]:
    return [event for event in trace["traceEvents"] if event["cat"] == "read"]


@contextmanager
def _running(
    commands: Sequence[Sequence[str]], logs: Path, environ: dict[str, str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes at once; those that are left are killed in the end."""
    processes = list[subprocess.Popen[bytes]]()
    try:
        for i, command in enumerate(commands):
            with (logs / f"{i}.log").open("w") as log:
                one = subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=log, env={**os.environ, **environ}
                )
            processes.append(one)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")
