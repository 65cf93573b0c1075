"""Nobody reading the output, a full disk, closed descriptors: no exit code depends on them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from jobs import job_words
from test_crash import CASE

from maxconv import cli
from maxconv.errors import RetryableError, UserError
from maxconv.processes.agreement import same_error_everywhere

MAXCONV = [sys.executable, "-m", "maxconv.cli"]
REDIRECTED = (">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&-")


@pytest.mark.parametrize("redirected", REDIRECTED)
def test_an_output_that_takes_nothing(redirected: str, tmp_path: Path) -> None:
    said = tmp_path / "said"
    other = f"2>{said}" if redirected.startswith(">") and "2>" not in redirected else f">{said}"
    other = "" if redirected.count(">") > 2 else other
    line = " ".join([*MAXCONV, "families", redirected, other])
    assert subprocess.run(line, shell=True, timeout=60).returncode == 0
    assert not said.exists() or "rror" not in said.read_text()


def test_a_reader_that_goes_away() -> None:
    line = f"set -o pipefail; {' '.join(MAXCONV)} families | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("model_name")


def test_what_was_said_before_a_failure_is_not_lost(tmp_path: Path) -> None:
    """Piped output is buffered, and the process ends at once."""
    program = (
        "from maxconv.processes import liveness; print('the plan'); liveness.fail(OSError('gone'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "the plan\n")
    assert done.stderr == "maxconv: failed: gone\n"


def test_killed_before_it_was_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoint has its last name, and the same command says that it is there."""
    model = tiny.write(CASE, tmp_path / "hf")
    words = job_words(tmp_path, model, tiny.maxtext_words(CASE, True), "fsdp8")
    assert cli.main(["convert", *words, "--verify=none"]) == 0
    record, out = tmp_path / "out/maxconv.json", tmp_path / "out"
    record.rename(out / "maxconv.unfinished.json")
    made = os.stat(out / "0/items").st_ctime_ns
    assert cli.main(["convert", *words]) == 0
    assert f"already saved by an earlier run: {out}/0/items" in capsys.readouterr().out
    assert sorted(os.listdir(out)) == ["0", "maxconv.json"]
    assert os.stat(out / "0/items").st_ctime_ns == made
    assert cli.main(["convert", *words]) == 2  # without that, a finished one is never replaced


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("bad"), UserError),
        (RetryableError("busy"), RetryableError),
        (ConnectionResetError("by peer"), RetryableError),
        (KeyError("architectures"), UserError),
        (RecursionError(), UserError),
    ],
)
def test_whatever_fails_before_a_byte_is_written(error: Exception, kind: type) -> None:
    with pytest.raises(kind) as raised, same_error_everywhere():
        raise error
    assert raised.value.problems and all(raised.value.problems)
