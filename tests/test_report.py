"""What a person reads: sizes, durations, tables, progress, plans and failures."""

import fcntl
import io
import os
import re
import struct
import termios
import time
from contextlib import suppress
from pathlib import Path

import pytest
from jobs import tiny_job

from maxconv.cli.plan_text import plan_text
from maxconv.cli.progress import ProgressLine
from maxconv.errors import (
    RetryableError,
    UserError,
    VerificationError,
    exit_code,
    failure_text,
    problems_text,
)
from maxconv.text import duration, size, table


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (65 << 20, "65.0 MiB"),
        (1.5 * (1 << 30), "1.5 GiB"),
        (750 << 40, "750.0 TiB"),
        (3 << 50, "3072.0 TiB"),
    ],
)
def test_size(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0s"),
        (9.94, "9.9s"),
        (59.94, "59.9s"),
        (59.97, "1m00s"),
        (60, "1m00s"),
        (125.4, "2m05s"),
        (3599.6, "1h00m"),
        (7 * 3600 + 59, "7h00m"),
        (100 * 3600, "100h00m"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_table() -> None:
    rows = [("decoder_norm", (512,), "1.0 KiB"), ("wo", (1408, 6, 512), "15.6 MiB")]
    assert table(rows, ("leaf", "shape", "bytes")).splitlines() == [
        "leaf          shape              bytes",
        "decoder_norm  (512,)           1.0 KiB",
        "wo            (1408, 6, 512)  15.6 MiB",
    ]
    assert table([], ("leaf", "bytes")) == "leaf  bytes"


def test_problems_text() -> None:
    assert problems_text(["one.", "two."]) == "maxconv: one.\nmaxconv: two."
    lines = problems_text([f"{i}." for i in range(50)]).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "maxconv: and 30 more like these."


def test_failure_text() -> None:
    disk = OSError(28, "No space left on device", "/out/0")
    wrapped = ExceptionGroup("in a task", [ExceptionGroup("in a thread", [disk])])
    assert failure_text(wrapped) == f"maxconv: failed: {disk}"
    try:
        raise ValueError
    except ValueError as error:
        first, *_, last = failure_text(error).splitlines()
    assert first.startswith("Traceback")
    assert last == "maxconv: failed: ValueError"
    busy = ExceptionGroup("in a task", [RetryableError("The Hub is busy.")])
    assert failure_text(busy) == "maxconv: The Hub is busy."


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("Bad word."), 2),
        (VerificationError("out", ["leaf x differs"]), 1),
        (RetryableError("The Hub is busy."), 42),
        (ExceptionGroup("", [ExceptionGroup("", [RetryableError("The Hub is busy.")])]), 42),
        (ConnectionResetError("by peer"), 42),
        (TimeoutError(), 42),
        (OSError(28, "No space left on device"), 1),
        (ValueError("a bug"), 1),
    ],
)
def test_exit_code(error: BaseException, code: int) -> None:
    assert exit_code(error) == code


def test_plan_text(tmp_path: Path) -> None:
    with tiny_job(tmp_path, "qwen3-8b", scan=False) as job:
        text = plan_text(job)
    assert re.search(r"^source   .*/hf, 36 tensors, ", text, re.M)
    assert "mesh     fsdp=4 x tensor=2, 8 devices, 1 process\n" in text
    assert "decoder/layers_{0..2}/mlp/wi_0/kernel" in text
    assert "(fsdp, tensor)" in text
    assert "0 B (0.0 %) more than needed" in text


def test_progress_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    log = io.StringIO()
    monkeypatch.setattr("maxconv.cli.progress.INTERVAL_IN_LOGS", 0.01)
    with ProgressLine("written", lambda: (3 << 20, 4 << 20), log):
        time.sleep(0.1)
    lines = log.getvalue().splitlines()
    assert all(line.startswith("written 3.0 MiB of 4.0 MiB (75.0 %), ") for line in lines)
    assert all("/s, 0.0s left, memory " in line for line in lines)
    assert "\x1b" not in log.getvalue() and "\r" not in log.getvalue()


def test_progress_before_there_is_a_pace() -> None:
    assert " left" not in ProgressLine("written", lambda: (0, 1 << 40), None)._text()
    assert " left" not in ProgressLine("written", lambda: (1 << 10, 1 << 40), None)._text()
    assert "(0 %)" in ProgressLine("written", lambda: (0, 0), None)._text()


def everything(terminal: int) -> str:
    """What was written to a terminal that is closed at its other end."""
    raw = b""
    with os.fdopen(terminal, "rb", buffering=0) as screen, suppress(OSError):
        while more := screen.read(4096):
            raw += more
    return raw.decode()


@pytest.mark.parametrize("columns", [0, 30, 200])
def test_progress_on_a_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxconv.cli.progress.INTERVAL_ON_TERMINALS", 0.01)
    terminal, ours = os.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(ours, "w") as out, ProgressLine("written", lambda: (1 << 20, 9 << 20), out):
        time.sleep(0.1)
    seen = everything(terminal)
    *rows, last = seen.split("\r")[1:]
    assert last == "\x1b[K" and rows  # in the end, the row is empty
    assert all(
        row.startswith("written 1.0 MiB of 9.0 MiB") and row[-3:] == "\x1b[K" for row in rows
    )
    assert all(len(row) - 3 < (columns or 80) for row in rows)


def test_silent_progress() -> None:
    with ProgressLine("written", lambda: 1 / 0, None):  # type: ignore[arg-type,return-value]
        pass
