"""A lock file, so that only one conversion at a time writes to a directory.

The lock names its owner, which renews it every few seconds. A lock that is no longer renewed is
taken over; immediately, if its owner was a process on this machine that is dead. Renewal is
observed over time, so that clocks of different machines are never compared.
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax

from maxconv.errors import ConversionError, UserError
from maxconv.processes import liveness
from maxconv.processes.agreement import once, same_error_everywhere

BEAT = 5  # seconds between two renewals
STALE = 60  # seconds without one after which an owner counts as dead
_POLL = 0.5  # seconds between two looks at the lock of another
_SETTLE = 1  # seconds to wait for another process that takes over the same lock
_MOST = 1 << 16  # maximum bytes of a lock file that are read


class Seen(NamedTuple):
    """The state of a lock; `version` changes whenever it is renewed or replaced."""

    version: str
    owner: Mapping[str, Any]


class Ownership:
    """The lock at `path`, a file or an object in a bucket; `place`: what it protects.

    Used by one process of a conversion, on behalf of all.
    """

    def __init__(self, path: str, place: str):
        self.place, self._version = place, ""
        self._lock = _Object(path) if "://" in path else _File(path)
        self._owner = {**_this_process(), "token": uuid.uuid4().hex}
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="ownership", daemon=True)

    @property
    def is_mine(self) -> bool:
        return bool(self._version)

    def acquire(self) -> None:
        """Takes the lock, possibly from an owner that is dead, and keeps renewing it.

        Takes up to `STALE` seconds if it is not known whether the owner is alive, and two beats if
        the lock names none.

        Raises:
            UserError: another conversion holds it.
        """
        while not self._version:
            seen = self._lock.get()
            if seen is not None:
                self._wait_until_dead(seen)
            version = self._lock.put(self._owner, over=seen.version if seen else None)
            if version is not None and seen is not None:
                time.sleep(_SETTLE)
                now = self._lock.get()
                version = now.version if now is not None and self._is_ours(now) else None
            self._version = version or ""
        liveness.before_exit(self.release)
        self._thread.start()

    def release(self) -> None:
        """Removes the lock, if it is held."""
        if not self._version:
            return
        self._released.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(BEAT)
        with suppress(Exception):  # it may be gone, with all that it protected
            if (now := self._lock.get()) is not None and self._is_ours(now):
                self._lock.delete(now.version)
        self._version = ""

    def _wait_until_dead(self, seen: Seen) -> None:
        """Returns once the owner of a lock is dead or has released it; UserError if it is alive."""
        # A lock that names nobody was cut off while it was written. If its owner lives, its next
        # beat completes it; if that comes later still, the owner finds that the lock is taken.
        bound = STALE if "token" in seen.owner else 2 * BEAT
        alive, until = _is_alive(seen.owner), time.monotonic() + bound
        while alive is None and time.monotonic() < until:
            time.sleep(_POLL)
            now = self._lock.get()
            if now is None:
                return
            alive = True if now.version != seen.version else None
        if alive:
            raise UserError(
                f"{self.place} is being written to by another job ({_said(seen.owner)}); "
                "wait for it to end, or name another directory."
            )

    def _is_ours(self, seen: Seen) -> bool:
        return seen.owner.get("token") == self._owner["token"]

    def _renew(self) -> None:
        while not self._released.wait(BEAT):
            try:
                if version := self._lock.put(self._owner, over=self._version):
                    self._version = version
                elif (now := self._lock.get()) is not None and not self._is_ours(now):
                    self._version = ""
                    liveness.fail(
                        ConversionError(
                            f"{self.place} was taken over by another job "
                            f"({_said(now.owner)}), as this one did not renew its lock in time."
                        )
                    )
                elif now is not None:
                    self._version = now.version
            except Exception:  # of the file system, the network, or their libraries: try again
                continue


def owned_by_all(path: str, place: str) -> Ownership | None:
    """Takes the lock at `path` on process 0, on behalf of all; None on the others.

    Raises:
        UserError: another conversion holds it; on all processes.
    """
    mine = Ownership(path, place) if jax.process_index() == 0 else None
    failed: list[UserError] = []

    def acquire() -> None:
        try:
            assert mine is not None
            mine.acquire()
        except UserError as error:
            failed.append(error)

    once(acquire)
    with same_error_everywhere():
        if failed:
            raise failed[0]
    return mine


class _File:
    def __init__(self, path: str):
        self._path = Path(path)

    def get(self) -> Seen | None:
        try:
            with self._path.open("rb") as file:  # NFS looks at the server when one is opened
                about = os.fstat(file.fileno())
                return Seen(f"{about.st_ino} {about.st_mtime_ns}", _object(file.read(_MOST)))
        except FileNotFoundError:
            return None

    def put(self, owner: Mapping[str, Any], over: str | None) -> str | None:
        """Creates the lock, or renews or replaces the version `over`; the new version if done."""
        seen = self.get()
        if (seen.version if seen else None) != over:
            return None
        if seen is not None and seen.owner == owner:
            os.utime(self._path)
        else:
            if seen is not None:
                self._path.unlink(missing_ok=True)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with self._path.open("xb", buffering=0) as file:
                    file.write(json.dumps(owner).encode())
            except FileExistsError:
                return None
        now = self.get()
        return now.version if now is not None and now.owner == owner else None

    def delete(self, version: str) -> None:
        del version
        self._path.unlink(missing_ok=True)


class _Object:
    """A lock in a bucket: an empty object with the owner as metadata; versions are generations."""

    def __init__(self, path: str):
        import fsspec

        self._fs: Any = fsspec.filesystem("gs")
        self._bucket, _, self._name = path.removeprefix("gs://").partition("/")

    def get(self) -> Seen | None:
        try:
            about = self._fs.call("GET", "b/{}/o/{}", self._bucket, self._name, json_out=True)
        except FileNotFoundError:
            return None
        owner = (about.get("metadata") or {}).get("owner", "")
        return Seen(str(about["generation"]), _object(owner.encode()))

    def put(self, owner: Mapping[str, Any], over: str | None) -> str | None:
        about = json.dumps({"name": self._name, "metadata": {"owner": json.dumps(owner)}})
        parts = [
            f"--==0==\nContent-Type: {kind}\n\n{text}\n"
            for kind, text in (("application/json; charset=UTF-8", about), ("text/plain", ""))
        ]
        try:
            made = self._fs.call(
                "POST",
                f"{self._fs._location}/upload/storage/v1/b/{self._bucket}/o",
                uploadType="multipart",
                ifGenerationMatch=over or "0",  # 0: there is none
                headers={"Content-Type": 'multipart/related; boundary="==0=="'},
                data=("".join(parts) + "--==0==--").encode(),
                json_out=True,
            )
        except FileExistsError:  # the precondition failed, or this is a retry after a lost answer
            now = self.get()
            return now.version if now is not None and now.owner == owner else None
        return str(made["generation"])

    def delete(self, version: str) -> None:
        self._fs.call("DELETE", "b/{}/o/{}", self._bucket, self._name, ifGenerationMatch=version)


def _object(text: bytes) -> Mapping[str, Any]:
    """Parses a JSON object; empty if it is not one, such as a truncated lock file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _machine() -> str:
    """Identifies this machine, its boot, and the container; empty if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks; None if it is not running."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _is_alive(owner: Mapping[str, Any]) -> bool | None:
    """Whether the owner is running; None if that is unknown here."""
    machine, pid = owner.get("machine"), owner.get("pid")
    if not machine or machine != _machine() or not isinstance(pid, int):
        return None
    return _started(pid) == owner.get("started")


def _said(owner: Mapping[str, Any]) -> str:
    fields = (owner.get(name, "unknown") for name in ("pid", "host", "since"))
    return "process {} on {}, since {}".format(*(str(field)[:100] for field in fields))
