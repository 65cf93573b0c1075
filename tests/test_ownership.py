"""One conversion at a time writes to a place; nothing there is deleted but what is for it to."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import serving
from test_crash import SLOW, Place, ended, started, wait_until

from maxconv.errors import UserError
from maxconv.targets import ownership, place
from maxconv.targets.ownership import Ownership

OWNER = """
import sys, time
from maxconv.targets.ownership import Ownership
Ownership(sys.argv[1], "out").acquire()
print("owned", flush=True)
time.sleep(600)
"""


def owner(lock: str) -> "subprocess.Popen[str]":
    """A process that owns a place."""
    command = [sys.executable, "-c", OWNER, lock]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "owned\n"
    return process


@pytest.fixture(params=["file", "bucket"])
def lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(ownership, "BEAT", 0.2)
    monkeypatch.setattr(ownership, "STALE", 4)
    if request.param == "file":
        yield str(tmp_path / "out" / "maxconv.lock")
    else:
        yield request.getfixturevalue("bucket_lock")


@pytest.fixture
def bucket_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    import fsspec

    with serving(tmp_path / "gcs") as bucket:
        for name, value in bucket.environ.items():
            monkeypatch.setenv(name, value)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
        yield "gs://bucket/out/maxconv.lock"
        fsspec.get_filesystem_class("gs").clear_instance_cache()


def test_there_is_one_owner_at_a_time(lock: str) -> None:
    first, second = Ownership(lock, "out"), Ownership(lock, "out")
    first.acquire()
    who = f"process {os.getpid()} on {socket.gethostname()}, since 2"
    with pytest.raises(UserError, match=f"^out is being written to by .*{who}"):
        second.acquire()
    second.release()  # is not its to release
    assert first._lock.get() is not None
    first.release()
    assert first._lock.get() is None
    second.acquire()
    second.release()


def test_a_killed_owner_of_this_machine_is_followed_at_once(lock: str) -> None:
    process = owner(lock)
    process.kill()  # and is not waited for: a process that is dead, but still listed
    mine, began = Ownership(lock, "out"), time.monotonic()
    while ownership._started(process.pid) is not None:
        time.sleep(0.01)
    mine.acquire()
    assert time.monotonic() - began < ownership.STALE
    mine.release()
    process.communicate()


@pytest.mark.slow
def test_an_owner_elsewhere_is_followed_when_it_is_silent(
    lock: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is alive shows in its lock alone, and so does that it is dead."""
    monkeypatch.setattr(ownership, "_machine", lambda: "another")
    first = Ownership(lock, "out")
    first.acquire()
    monkeypatch.setattr(ownership, "_machine", lambda: "this one")
    second = Ownership(lock, "out")
    with pytest.raises(UserError, match="is being written to by another job"):
        second.acquire()
    first._released.set()  # is silent from now on
    second.acquire()
    assert second.is_mine and not first._lock.put(first._owner, over=first._version)
    second.release()


@pytest.mark.parametrize("text", ["", "[]", "\0\xff", '{"pid": "x", "machine": 3}', "[" * 9999])
def test_a_broken_lock_is_one_without_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(ownership, "BEAT", 0.5)
    monkeypatch.setattr(ownership, "_SETTLE", 0)
    path = tmp_path / "maxconv.lock"
    path.write_text(text)
    mine, began = Ownership(str(path), "out"), time.monotonic()
    mine.acquire()
    assert time.monotonic() - began < ownership.STALE / 2
    assert json.loads(path.read_text()) == mine._owner
    mine.release()
    assert not path.exists()


def test_a_lock_that_is_being_written_has_an_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is empty for a moment; whoever comes too late to write to it does not have it."""
    monkeypatch.setattr(ownership, "BEAT", 0.5)
    path = tmp_path / "maxconv.lock"
    first, second = Ownership(str(path), "out"), Ownership(str(path), "out")
    path.write_text("")
    mended = threading.Timer(0.5, path.write_text, [json.dumps(first._owner)])
    mended.start()
    with pytest.raises(UserError, match="is being written to by another job"):
        second.acquire()
    path.unlink()
    taken = json.dumps(second._owner)
    monkeypatch.setattr(json, "dumps", lambda owner: path.unlink() or path.write_text(taken) and "")
    assert first._lock.put(first._owner, over=None) is None
    assert path.read_text() == taken


def test_what_another_has_by_now_is_not_released(bucket_lock: str) -> None:
    """In a bucket that is certain: the generation that is deleted is the one that was seen."""
    first, second = Ownership(bucket_lock, "out"), Ownership(bucket_lock, "out")
    first.acquire()
    first._released.set()
    first._thread.join()
    seen = first._lock.get()
    assert seen is not None and second._lock.put(second._owner, over=seen.version)
    first._lock.get = lambda: seen  # as it was just before
    first.release()
    now = second._lock.get()
    assert now is not None and second._is_ours(now) and not first.is_mine


def test_of_many_one_takes_over(lock: str) -> None:
    dead = owner(lock)
    dead.kill()
    dead.communicate()
    held: list[Ownership] = []

    def take() -> None:
        mine = Ownership(lock, "out")
        try:
            mine.acquire()
        except UserError:
            return
        held.append(mine)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1
    held[0].release()


@pytest.mark.slow
def test_a_second_conversion_does_not_begin(tmp_path: Path) -> None:
    """Nor does it touch what the first has; the first ends well."""
    where = Place(tmp_path)
    with started(where.words, SLOW=SLOW) as first:
        wait_until(where.has_data, first)
        first.send_signal(signal.SIGSTOP)  # it lives, and takes as long as it takes here
        for more in ((), ("--resume",), ("--overwrite",)):
            with started([*where.words, *more]) as second:
                code, said = ended(second)
            assert code == 2 and f"process {first.pid} on " in said, said
        first.send_signal(signal.SIGCONT)
        code, said = ended(first)
        assert code == 0, said
    assert sorted(path.name for path in where.out.iterdir()) == ["0", "maxconv.json"]


def test_only_what_a_conversion_left_is_cleared(tmp_path: Path) -> None:
    """Told before, in a sentence; the record of a conversion beside it makes it one's own."""
    out = tmp_path / "out"
    foreign = out / "0.orbax-checkpoint-tmp" / "items.orbax-checkpoint-tmp" / "notes.txt"
    (foreign.parent / "d").mkdir(parents=True)
    (problem,) = place.problems(str(out), 0, overwrite=True)
    assert problem == (
        f"{out}/0.orbax-checkpoint-tmp was not written by maxconv, which does not delete it; "
        "remove it, or name another directory."
    )
    place.leave_record(str(out), place.UNFINISHED_WORDS, {})
    assert place.problems(str(out), 0, overwrite=False) == []
    foreign.write_text("of mine")
    (problem,) = place.problems(str(out), 0, overwrite=False)
    assert problem.startswith(f"{foreign} was not written by maxconv")
    foreign.rename(foreign.parent.parent / "notes.txt")
    (problem,) = place.problems(str(out), 0, overwrite=False)
    assert problem.startswith(f"{foreign.parent.parent}/notes.txt was not written by maxconv")
    shutil.rmtree(foreign.parent.parent)
    assert place.problems(str(out), 0, overwrite=False) == []
