"""Makes all processes end together if one fails, and reports the cause once.

Every second each process writes a heartbeat to the key-value store of JAX's coordination service,
and checks that of the next process in a ring. The first process that fails, or finds the next one
silent, posts that to the store, and all exit with its exit code.
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

BEAT = 1  # seconds between two heartbeats
SILENCE = 15  # seconds without a heartbeat after which a process is considered gone
NOTHING_SAVED = "maxconv: nothing was saved"
_FAILED, _ALIVE = "maxconv/failed", "maxconv/alive/{}"
_HEAR = 2  # seconds for others to learn of a failure before the coordination service shuts down
_SIGNALS = {
    signal.SIGINT: (130, "maxconv: interrupted"),
    signal.SIGTERM: (
        RetryableError.exit_code,
        "maxconv: terminated (SIGTERM), as when a host is preempted",
    ),
}

_ring: "_Ring | None" = None
_unsaved = False  # whether a save is under way
_last_acts: list[Callable[[], object]] = []
_LAST = 3  # seconds that they may take in all


def watch() -> None:
    """Starts the heartbeats: from now on the processes of `jax.distributed` end together."""
    from maxconv.private.jax import global_state

    global _ring
    if _ring is None and (global_state.num_processes or 1) > 1:
        _ring = _Ring(global_state.client, global_state.process_id, global_state.num_processes)


def fail(error: BaseException) -> NoReturn:
    """Ends all processes because of an error, which is reported unless another came first.

    Exits immediately: a normal exit would wait for threads that are reading and writing.
    """
    _end(exit_code(error), failure_text(error), _ring is not None and _may_follow(error))


def before_exit(act: Callable[[], object]) -> None:
    """Registers a short action for when this process exits immediately."""
    _last_acts.append(act)


def _do_last_acts() -> None:
    """Runs them in threads with a timeout, so that they cannot keep the process from ending."""
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
    """Ends all processes if the block fails; for work in which all take part."""
    try:
        yield
    except BaseException as error:
        if _ring is None:
            raise
        fail(error)


@contextmanager
def unsaved() -> Iterator[None]:
    """Marks a block in which a failure means that nothing was saved, until `saved` is called."""
    global _unsaved
    _unsaved = True
    yield
    _unsaved = False  # stays set after an exception, which is reported later


def saved() -> None:
    """Says that from now on there is a checkpoint, whatever else fails."""
    global _unsaved
    _unsaved = False


def leave(code: int) -> int:
    """Ends all processes with a common exit code; with a single process, just returns it.

    A normal exit would shut JAX down with a barrier of its own, where a process can wait for
    minutes for a coordinator that is gone. Here process 0 exits last.
    """
    if _ring is None:
        return code
    from jax.errors import JaxRuntimeError

    try:
        # Not a collective: that could finish here while its last bytes are still on their way.
        _ring.client.wait_at_barrier("maxconv: leaving", timeout_in_ms=20_000)
    except JaxRuntimeError:
        _ring.fail(code or 1, "maxconv: not all processes finished", may_follow=True)
    _ring.exit(code, 1)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end the job, whatever the main thread is waiting for."""
    if threading.current_thread() is not threading.main_thread():  # cannot set signal handlers
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
    """Ends the job on the first signal; returns when the pipe is closed."""
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
    """Whether an error may just be a consequence of another process ending."""
    import jax

    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(error)
        if isinstance(error, BaseExceptionGroup):
            return any(map(_may_follow, error.exceptions))
        error = error.__cause__ or error.__context__
    return False


def _tell(said: str) -> None:
    start = "\n" if sys.stderr.isatty() else ""  # after ^C, and the progress line
    with suppress(OSError, ValueError):  # a closed output must not keep the process alive
        sys.stdout.flush()  # earlier output comes first
        ending = f"\n{NOTHING_SAVED}" if _unsaved else ""
        say(f"{start}{said}{ending}", sys.stderr)


class _Ring:
    """The heartbeats of this process. `client` is that of JAX's coordination service."""

    def __init__(self, client: Any, process: int, processes: int):
        self.client, self._process = client, process
        self._next = (process + 1) % processes
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="together", daemon=True)
        atexit.register(self._stop)
        self._thread.start()

    def fail(self, code: int, said: str, may_follow: bool) -> NoReturn:
        """Ends all processes; reports the cause, unless another process failed first."""
        if may_follow:
            time.sleep(SILENCE + 5 * BEAT)  # by then the other process' end is detected
        with self._ending:  # never released
            if (first := self._post(code)) is None:
                _tell(said)
                self.exit(code, _HEAR)
            self._follow(first)

    def exit(self, code: int, seconds: float) -> NoReturn:
        """Ends this process; process 0 after `seconds`, and the coordination service with it."""
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
        """Posts a failure of this process; returns the post of another process that was first."""
        from jax.errors import JaxRuntimeError

        word = json.dumps({"process": self._process, "code": code})
        try:
            self.client.key_value_set(_FAILED, word)
        except JaxRuntimeError:
            try:
                return self.client.key_value_try_get(_FAILED)
            except JaxRuntimeError:  # the coordination service is gone
                return None

    def _follow(self, word: str) -> NoReturn:
        first = json.loads(word)
        if self._process == 0 and first["process"]:
            with suppress(OSError, ValueError):
                say(
                    f"maxconv: ended by process {first['process']}, whose output has the cause",
                    sys.stderr,
                )
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
            return None  # it has not started yet

    def _end_if_silent(self, process: int, heard: float) -> None:
        if time.monotonic() - heard > SILENCE:
            said = (
                f"maxconv: process {process} disappeared without a message: it was killed, ran out "
                "of memory, or its host was preempted"
            )
            self.fail(RetryableError.exit_code, said, False)

    def _stop(self) -> None:
        """Stops using the client, before JAX and Python shut down."""
        self._stopped.set()
        self._thread.join(2 * BEAT)
