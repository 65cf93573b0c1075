"""Whatever ends a conversion in the middle: what it leaves is no checkpoint, and it can be redone.

Each conversion is a process of its own, in which reading is slow or goes wrong when it should.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import job_words
from orbax.checkpoint import v1 as ocp

from maxconv import cli
from maxconv.processes import liveness
from maxconv.targets import place as target

CASE = "llama3.1-8b"
SLOW = 0.1  # seconds that each of some 30 reads takes; two threads read
PROGRAM = """
import itertools, os, sys, time
from pathlib import Path
from maxconv import cli
from maxconv.sources import LocalSource

fetch, count = LocalSource._fetch, itertools.count(1)

def spoiled(source, info, *args):
    read = next(count)
    time.sleep(float(os.environ.get("SLOW", 0)))
    if read == int(os.environ.get("TRUNCATE_AT", -1)):
        os.truncate(Path(source.root, info.file), 1000)
    if read == int(os.environ.get("INTERRUPT_AT", -1)):
        os.kill(os.getpid(), 2)
    fetch(source, info, *args)

LocalSource._fetch = spoiled
sys.exit(cli.main(sys.argv[1:]))
"""


class Place:
    """A tiny checkpoint, and where it is converted to."""

    def __init__(self, directory: Path):
        hf = tiny.write(CASE, directory / "hf")
        self.out, self.hf = directory / "out", hf
        words = job_words(directory, hf, tiny.maxtext_words(CASE, True), "fsdp8")
        self.words = ["convert", *words, "--verify=none"]

    @property
    def unfinished(self) -> list[Path]:
        return list(self.out.glob("0.orbax-checkpoint-tmp*"))

    def has_data(self) -> bool:
        try:
            return any(self.out.glob("0.*/items.orbax-checkpoint-tmp*/**/d/*"))
        except FileNotFoundError:  # a directory has been renamed meanwhile
            return False

    def has_none(self) -> bool:
        """Whether neither Orbax nor MaxText finds a checkpoint, or a word of one."""
        if (self.out / "0").exists() or (self.out / "maxconv.json").exists():
            return False
        with ocp.training.Checkpointer(str(self.out)) as checkpointer:
            return checkpointer.latest is None

    def converts(self, *words: str) -> None:
        """The same command does it now, and leaves nothing of the attempts before."""
        assert cli.main([*self.words, "--verify=full", *words]) == 0
        assert sorted(path.name for path in self.out.iterdir()) == ["0", "maxconv.json"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@contextmanager
def started(words: Sequence[str], **environ: object) -> "Iterator[subprocess.Popen[str]]":
    env = os.environ | {key: str(value) for key, value in environ.items()}
    command = [sys.executable, "-c", PROGRAM, *words]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, env=env, text=True, stdout=pipe, stderr=pipe)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def wait_until(done: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not done():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """The exit code, and what it said on stderr, without the notes."""
    _, err = process.communicate(timeout=60)
    said = [line for line in err.splitlines(keepends=True) if not line.startswith("note: ")]
    return process.returncode, "".join(said)


@pytest.mark.parametrize(
    "seconds",
    [pytest.param(0, marks=pytest.mark.slow), 0.3, pytest.param(0.8, marks=pytest.mark.slow)],
)
def test_killed(place: Place, seconds: float) -> None:
    with started(place.words, SLOW=SLOW) as process:
        wait_until(lambda: bool(place.unfinished), process)
        time.sleep(seconds)
        process.kill()
        assert ended(process)[0] == -signal.SIGKILL
    assert place.unfinished and place.has_none()
    place.converts()


def test_interrupted(place: Place) -> None:
    with started(place.words, SLOW=SLOW) as process:
        wait_until(place.has_data, process)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        code, said = ended(process)
    assert time.monotonic() - began < 10
    assert code == 130
    assert said == "maxconv: interrupted\nmaxconv: nothing was saved\n"
    assert place.unfinished and place.has_none()
    place.converts()


def test_told_to_end_when_nobody_reads_what_it_says(place: Place) -> None:
    with started(place.words, SLOW=SLOW) as process:
        wait_until(place.has_data, process)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        process.stderr.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 42
    assert place.has_none()


def test_interrupted_at_the_first_read(place: Place) -> None:
    with started(place.words, INTERRUPT_AT=1, SLOW=SLOW) as process:
        code, said = ended(process)
    assert code == 130 and said.count("\n") == 2
    assert place.has_none()


def test_the_source_is_truncated_meanwhile(place: Place) -> None:
    with started(place.words, TRUNCATE_AT=20) as process:
        code, said = ended(process)
    assert code == 1
    failed, nothing = said.splitlines()
    assert failed.startswith("maxconv: failed: model-0000")
    assert "was truncated while it was being read (tensor 'model." in failed
    assert nothing == "maxconv: nothing was saved"
    assert place.has_none()
    tiny.write(CASE, place.hf)
    place.converts()


def test_the_disk_fills_meanwhile(place: Place) -> None:
    """A limit on the size of a file fails a write as a full disk does."""
    limited = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000)); "
    command = [sys.executable, "-c", limited + PROGRAM, *place.words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    failed, _ = (line for line in done.stderr.splitlines() if not line.startswith("note: "))
    assert failed.startswith("maxconv: failed: ") and "File too large" in failed
    assert place.has_none()
    place.converts()


def test_overwriting(place: Place) -> None:
    """The old checkpoint goes when the new one starts, not before."""
    place.converts()
    before = {path: path.stat().st_mtime_ns for path in place.out.rglob("*")}
    overwrite = [*place.words, "--overwrite"]
    assert cli.main([*overwrite, "--hf_model_path=/none"]) == 2
    assert {path: path.stat().st_mtime_ns for path in place.out.rglob("*")} == before
    with started(overwrite, SLOW=SLOW) as process:
        wait_until(place.has_data, process)
        process.kill()
        ended(process)
    assert place.has_none()
    place.converts()


def test_removing_the_old_is_interrupted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that is half removed is none."""
    place.converts()

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            target.clear(str(place.out))
    assert place.unfinished and place.has_none()
    place.converts()


def test_interrupted_while_it_verifies(place: Place) -> None:
    """Then there is a checkpoint, and it was said so."""
    words = [*place.words, "--verify=full"]
    with started(words, SLOW=SLOW) as process:
        wait_until((place.out / "maxconv.json").exists, process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"saved: {place.out}/0/items" in out
    assert "interrupted" in err and "saved" not in err
    assert cli.main(["verify", str(place.out)]) == 0


def test_nothing_was_saved_is_said_only_until_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsaved, leave_record = {}, target.leave_record

    def noted(directory: str, name: str, record: Any) -> None:
        unsaved[name] = liveness._unsaved
        leave_record(directory, name, record)

    monkeypatch.setattr(target, "leave_record", noted)
    assert cli.main(place.words) == 0
    assert unsaved == {target.UNFINISHED_WORDS: True, target.WORDS: False}
