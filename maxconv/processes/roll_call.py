"""All processes of a job meet before JAX joins them, and are told who is missing, gone or refused.

JAX's own way to join is a barrier that says nothing until it aborts the process. So process 0
listens at the coordinator's address first, and leaves it to JAX's service when all are there.
"""

import asyncio
import json
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from maxconv.errors import ConversionError, RetryableError, UserError
from maxconv.processes.agreement import told, untold
from maxconv.processes.coordinator import LINGER
from maxconv.text import duration, printable

_ANSWER = 10  # seconds for the other end of a connection to send the next line
_STRAGGLERS = 15  # seconds in which processes that come late still hear why the job ends
_HERE, _GO = b"maxconv: here\n", b"maxconv: go\n"
_MOST_NAMED = 8  # processes in one sentence
_MOST_PROBLEMS = 20  # of one process are sent to the others; it reports all of them itself
_LONGEST = 1 << 20  # bytes of a line

_met = False


@dataclass(frozen=True)
class Processes:
    """The processes of a job: where their coordinator listens, how many, and which this one is."""

    address: str
    """`HOST:PORT`."""
    n: int
    mine: int

    @property
    def others(self) -> str:
        """Whom this process waits for, in words."""
        others = "the other process" if self.n == 2 else f"{self.n - 1} other processes"
        return "process 0" if self.mine else others

    @property
    def where(self) -> str:
        """Where it waits for them, in words."""
        return f"at {self.address}" if self.mine else f"to come to {self.address}"


def met() -> bool:
    """Whether this process has been at a roll call, with whatever result."""
    return _met


def meet(at: Processes, seconds: float, refused: Exception | None = None) -> None:
    """Waits until all processes are there; returns at the same time on all of them.

    Args:
        at: where they meet.
        seconds: that a process waits for the others.
        refused: why this process cannot go on. The others end with it; here, nothing is raised.

    Raises:
        UserError: a process cannot go on, or they were told different things about each other.
        RetryableError: a process did not come, or went away. Both the same on all who are there.
    """
    global _met
    _met = True
    problem = None if refused is None else _of(at.mine, refused)
    error = asyncio.run((_host if at.mine == 0 else _visit)(at, seconds, problem))
    if error is not None and refused is None:
        raise error


def _of(process: int, error: Exception) -> ConversionError:
    """An error on one process, as it is told to the others."""
    kind, problems = told(error)
    said = [f"Process {process} cannot go on: {printable(problem)}" for problem in problems]
    return untold(kind, said[:_MOST_PROBLEMS])


class _Roll:
    """The processes that have come to process 0, and the problem that ends the job, if any."""

    def __init__(self, n: int, problem: ConversionError | None):
        self.problem = problem
        self._n = n
        self._connections: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._came: dict[asyncio.StreamWriter, int] = {}
        self._changed = asyncio.Event()
        self._over = False

    @property
    def missing(self) -> list[int]:
        return sorted(set(range(1, self._n)) - set(self._came.values()))

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serves a connection until it closes; drops those from outside this job."""
        task = asyncio.current_task()
        assert task is not None
        self._connections[task] = writer
        try:
            line = await asyncio.wait_for(reader.readline(), _ANSWER)
            process, n, cannot = (json.loads(line)[key] for key in ("process", "of", "cannot"))
            process = int(process)
            if problem := self._problem(process, n, cannot):
                self._fail(problem)
        except (OSError, ValueError, KeyError, TypeError, TimeoutError):
            writer.close()  # it is not a process of this job
            return
        writer.write(_HERE)
        self._came[writer] = process
        self._changed.set()
        with suppress(OSError):  # a reset is an end, too
            await reader.read()
        if not self._over:
            self._fail(RetryableError(f"Process {process} went away before all had come."))

    def _problem(self, process: int, n: int, cannot: object) -> ConversionError | None:
        if n != self._n:
            return UserError(
                f"num_processes is {self._n} on process 0 and {n} on process {process}; start the "
                "same command on all of them."
            )
        if process in self._came.values() or not 0 < process < n:
            return UserError(f"Two processes have process_id={process}; each needs its own.")
        return untold(*cannot) if isinstance(cannot, list) else None

    def _fail(self, problem: ConversionError) -> None:
        self.problem = self.problem or problem
        self._changed.set()

    async def settle(self, complete_only: bool) -> None:
        """Waits for all to come or, unless `complete_only`, for a reason not to go on."""
        while self.missing and (complete_only or self.problem is None):
            self._changed.clear()
            await self._changed.wait()

    async def end(self) -> None:
        """Tells all processes that came to go on, or why the job ends."""
        self._over = True
        word = _GO if self.problem is None else json.dumps(told(self.problem)).encode() + b"\n"
        for writer in self._came:
            with suppress(OSError):
                writer.write(word)
                await writer.drain()
        for writer in self._connections.values():
            writer.close()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_ANSWER)


async def _host(at: Processes, seconds: float, problem: ConversionError | None) -> Exception | None:
    """The roll call on process 0."""
    roll = _Roll(at.n, problem)
    server = await _listen(roll, int(at.address.rpartition(":")[2]))
    try:
        await asyncio.wait_for(roll.settle(complete_only=False), seconds)
        await asyncio.wait_for(roll.settle(complete_only=True), min(seconds, _STRAGGLERS))
    except TimeoutError:
        roll.problem = roll.problem or RetryableError(
            f"Process 0 waited {duration(seconds)} in vain for {_named(roll.missing)} of {at.n} to "
            f"come to {at.address}; see what happened there, and start the same command on all "
            "workers (gcloud takes --worker=all)."
        )
    finally:
        server.close()
        await roll.end()
    return roll.problem


async def _listen(roll: _Roll, port: int) -> asyncio.Server:
    """Listens, once the service of an attempt before this one has left the port."""
    until = time.monotonic() + LINGER + 5
    while True:
        try:
            return await asyncio.start_server(roll.answer, port=port, limit=_LONGEST)
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"Port {port} is in use on the host of process 0 ({error.strerror}); end what "
                    "uses it, or give another in --coordinator_address."
                ) from error
        await asyncio.sleep(0.5)


async def _visit(
    at: Processes, seconds: float, problem: ConversionError | None
) -> Exception | None:
    """The roll call on another process."""
    until = time.monotonic() + seconds
    while (connection := await _connected(at, problem)) is None:
        if time.monotonic() > until:
            return RetryableError(
                f"Process {at.mine} of {at.n} waited {duration(seconds)} in vain for process 0 at "
                f"{at.address}; start the same command on all workers (gcloud takes "
                f"--worker=all), and see that port {at.address.rpartition(':')[2]} is open "
                "between them."
            )
        await asyncio.sleep(0.2)
    reader, writer = connection
    with suppress(OSError, ValueError, TypeError, TimeoutError):
        line = await asyncio.wait_for(reader.readline(), seconds + _STRAGGLERS + _ANSWER)
        writer.close()
        if line:
            return None if line == _GO else untold(*json.loads(line))
    return RetryableError("Process 0 went away before all processes had come.")


async def _connected(
    at: Processes, problem: ConversionError | None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """A connection to process 0, once it has answered; None if it has not yet."""
    host, _, port = at.address.rpartition(":")
    cannot = None if problem is None else told(problem)
    hello = json.dumps({"process": at.mine, "of": at.n, "cannot": cannot})
    with suppress(OSError, ValueError, TimeoutError):
        connect = asyncio.open_connection(host.strip("[]"), int(port), limit=_LONGEST)
        reader, writer = await asyncio.wait_for(connect, _ANSWER)
        writer.write(hello.encode() + b"\n")
        if await asyncio.wait_for(reader.readline(), _ANSWER) == _HERE:
            return reader, writer
        writer.close()
    return None


def _named(processes: Iterable[int]) -> str:
    """`process 3`, or `processes 3, 5 and 2 more`."""
    names = [str(process) for process in processes]
    if len(names) > _MOST_NAMED:
        names[_MOST_NAMED:] = [f"{len(names) - _MOST_NAMED} more"]
    *most, last = names
    return f"processes {', '.join(most)} and {last}" if most else f"process {last}"
