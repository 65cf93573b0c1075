"""Processes end together: when one fails all do, and the cause is told once.

Every process says each second, in the key-value store of JAX's coordination service, that it
lives, and looks whether its neighbour in the ring of processes does. The first one that fails, or
finds its neighbour silent, leaves word there, and all end with its exit code.
"""

import atexit
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from maxconv.errors import RetryableError, exit_code, failure_text
from maxconv.text import say

BEAT = 1  # seconds between two signs of life
SILENCE = 15  # seconds without one after which a process counts as gone
NOTHING_SAVED = "maxconv: nothing was saved"
_FAILED, _ALIVE = "maxconv/failed", "maxconv/alive/{}"
_HEAR = 2  # seconds in which the others hear of a failure, before the coordination service goes
_SIGNALS = {
    signal.SIGINT: (130, "maxconv: interrupted"),
    signal.SIGTERM: (
        RetryableError.exit_code,
        "maxconv: told to end (SIGTERM), as when a host is preempted",
    ),
}

_ring: "_Ring | None" = None
_unsaved = False  # whether a save is under way
_last_acts: list[Callable[[], object]] = []
_LAST = 3  # seconds that they may take


def watch() -> None:
    """From now on the processes of `jax.distributed` end together."""
    from maxconv.private.jax import global_state

    global _ring
    if _ring is None and (global_state.num_processes or 1) > 1:
        _ring = _Ring(global_state.client, global_state.process_id, global_state.num_processes)


def fail(error: BaseException) -> NoReturn:
    """Ends this process, and all others, because of an error; it is told unless it was not first.

    Not a normal exit: that waits for threads, in which reads and writes go on.
    """
    _end(exit_code(error), failure_text(error), _ring is not None and _may_follow(error))


def before_exit(act: Callable[[], object]) -> None:
    """Has something done, if it takes a moment only, when this process ends in a hurry."""
    _last_acts.append(act)


def _do_last_acts() -> None:
    """On threads of their own: nothing keeps a process from ending."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    threads = [threading.Thread(target=act, daemon=True) for act in _last_acts]
    for thread in threads:
        thread.start()
    until = time.monotonic() + _LAST
    for thread in threads:
        thread.join(max(0, until - time.monotonic()))


@contextmanager
def all_or_none() -> Iterator[None]:
    """Ends all processes when the work inside fails and others take part in it."""
    try:
        yield
    except BaseException as error:
        if _ring is None:
            raise
        fail(error)


@contextmanager
def unsaved() -> Iterator[None]:
    """Says of a failure inside that nothing was saved."""
    global _unsaved
    _unsaved = True
    yield
    _unsaved = False  # not after a failure, which is yet to be told


def leave(code: int) -> int:
    """Ends all processes with a code that they all came to; returns it if there is but one.

    A normal exit would shut JAX down behind a barrier of its own, where a process can be left
    waiting for minutes for a coordinator that is gone. So the first leaves last.
    """
    if _ring is None:
        return code
    from jax.errors import JaxRuntimeError

    try:
        # Not a collective: it would be over here while its last bytes are on their way there.
        _ring.client.wait_at_barrier("maxconv: leaving", timeout_in_ms=20_000)
    except JaxRuntimeError:
        _ring.fail(code or 1, "maxconv: not all processes came to this end", may_follow=True)
    _ring.exit(code, 1)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end the job, whatever the main thread is waiting for."""
    if threading.current_thread() is not threading.main_thread():  # has no say in signals
        yield
        return
    received, arrives = os.pipe()
    os.set_blocking(arrives, False)
    before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)
    threading.Thread(target=_leave_on, args=(received,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        os.close(arrives)
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_on(received: int) -> None:
    """Ends the job on the first signal; returns when there will be none."""
    with open(received, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] in _SIGNALS:
                _end(*_SIGNALS[signal.Signals(number[0])])


def _end(code: int, said: str, may_follow: bool = False) -> NoReturn:
    if _ring is None:
        _tell(said)
        _do_last_acts()
        os._exit(code)
    _ring.fail(code, said, may_follow)


def _may_follow(error: BaseException | None) -> bool:
    """Whether an error may be no more than what the end of another process looks like from here."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if isinstance(error, BaseExceptionGroup):
            return any(map(_may_follow, error.exceptions))
        error = error.__cause__ or error.__context__
    return False


def _tell(said: str) -> None:
    start = "\n" if sys.stderr.isatty() else ""  # after ^C, and the line of progress
    with suppress(OSError, ValueError):  # nobody may be reading: that keeps no process alive
        sys.stdout.flush()  # what was said so far comes first
        ending = f"\n{NOTHING_SAVED}" if _unsaved else ""
        say(f"{start}{said}{ending}", sys.stderr)


class _Ring:
    """This process among the others. `client` is that of JAX's coordination service."""

    def __init__(self, client: Any, process: int, processes: int):
        self.client, self._process = client, process
        self._next = (process + 1) % processes
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="together", daemon=True)
        atexit.register(self._stop)
        self._thread.start()

    def fail(self, code: int, said: str, may_follow: bool) -> NoReturn:
        """Ends all processes; tells why, unless another one came first."""
        if may_follow:
            time.sleep(SILENCE + 5 * BEAT)  # then it would have been found out
        with self._ending:  # never released
            if (first := self._post(code)) is None:
                _tell(said)
                self.exit(code, _HEAR)
            self._follow(first)

    def exit(self, code: int, seconds: float) -> NoReturn:
        """Ends this process; process 0 after some seconds, and the coordination service with it."""
        from maxconv.private.jax import global_state

        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        _do_last_acts()
        if self._process == 0:
            time.sleep(seconds)
            if global_state.service is not None:
                global_state.service.shutdown()
        os._exit(code)

    def _post(self, code: int) -> str | None:
        """Leaves word of a failure here; returns the word of another that was first."""
        from jax.errors import JaxRuntimeError

        word = json.dumps({"process": self._process, "code": code})
        try:
            self.client.key_value_set(_FAILED, word)
        except JaxRuntimeError:
            try:
                return self.client.key_value_try_get(_FAILED)
            except JaxRuntimeError:  # there is nobody to tell
                return None

    def _follow(self, word: str) -> NoReturn:
        first = json.loads(word)
        if self._process == 0 and first["process"]:
            with suppress(OSError, ValueError):
                say(f"maxconv: ended by process {first['process']}, which says why", sys.stderr)
        self.exit(first["code"], _HEAR)

    def _run(self) -> None:
        from jax.errors import JaxRuntimeError

        sign, heard = None, time.monotonic()
        for beat in range(1 << 62):
            try:
                self.client.key_value_set(_ALIVE.format(self._process), str(beat), True)
                word = self.client.blocking_key_value_get(_FAILED, BEAT * 1000)
                with self._ending:
                    self._follow(word)
            except JaxRuntimeError as error:
                if self._stopped.is_set():
                    return
                if "DEADLINE_EXCEEDED" not in str(error):
                    self._end_if_silent(0, heard)
                    time.sleep(BEAT)
                    continue
            now = self._sign_of_next()
            if now != sign:
                sign, heard = now, time.monotonic()
            self._end_if_silent(self._next, heard)

    def _sign_of_next(self) -> str | None:
        from jax.errors import JaxRuntimeError

        try:
            return self.client.key_value_try_get(_ALIVE.format(self._next))
        except JaxRuntimeError:
            return None  # it has not begun

    def _end_if_silent(self, process: int, heard: float) -> None:
        if time.monotonic() - heard > SILENCE:
            said = (
                f"maxconv: process {process} is gone without a word: killed, out of memory, or "
                "its host was taken away"
            )
            self.fail(RetryableError.exit_code, said, False)

    def _stop(self) -> None:
        """Lets go of the client, before JAX and Python shut down."""
        self._stopped.set()
        self._thread.join(2 * BEAT)
