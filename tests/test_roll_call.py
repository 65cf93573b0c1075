"""Processes that meet, played by threads: what each of them is told."""

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_processes import free_port

from maxconv.errors import RetryableError, UserError
from maxconv.processes.roll_call import Processes, meet

Play = Callable[[], object]


class Job:
    """`n` processes of one job, of which some are there."""

    def __init__(self, n: int):
        self.n, self.port = n, free_port()

    def process(self, i: int, seconds: float = 20, refused: Exception | None = None) -> Play:
        return lambda: meet(Processes(f"127.0.0.1:{self.port}", self.n, i), seconds, refused)

    def says(self, line: bytes) -> Play:
        """Something else that connects, says a line, and goes when it is answered."""

        def play() -> None:
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", self.port), 10) as connection:
                        connection.sendall(line)
                        connection.recv(100)
                        return
                except OSError:
                    time.sleep(0.1)

        return play


def hello(process: int, n: int) -> bytes:
    return json.dumps({"process": process, "of": n, "cannot": None}).encode() + b"\n"


def told(*plays: Play) -> list[str]:
    """What each is told: the kind and the text of an error, or nothing."""

    def result(play: Play) -> str:
        try:
            play()
        except (UserError, RetryableError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(len(plays)) as threads:
        return list(threads.map(result, plays))


def test_all_come() -> None:
    job = Job(4)
    assert told(*(job.process(i) for i in (2, 0, 3, 1))) == [""] * 4


def test_strangers_do_not_matter() -> None:
    job = Job(2)
    strangers = [job.says(line) for line in (b"GET / HTTP/1.1\r\n", b"[1]\n", b"{}\n", b"\xff\n")]
    assert told(*strangers, job.process(0), lambda: (time.sleep(1), job.process(1)()))[-2:] == [
        "",
        "",
    ]


def test_says_who_is_missing() -> None:
    job = Job(5)
    zero, two = told(job.process(0, 2), job.process(2, 9))
    assert zero == two
    assert zero.startswith("RetryableError: Process 0 waited 2.0s in vain for processes 1, 3 and 4")


def test_nobody_at_the_address() -> None:
    (one,) = told(Job(2).process(1, 1))
    assert one.startswith("RetryableError: Process 1 of 2 waited 1.0s in vain for process 0 at 127")


@pytest.mark.parametrize("refuses", [0, 1])
def test_one_cannot_go_on(refuses: int) -> None:
    job, error = Job(3), UserError(["--a is no option.", "--b is none."])
    said = told(*(job.process(i, refused=error if i == refuses else None) for i in range(3)))
    assert said.pop(refuses) == ""  # it has told its own user
    assert (
        said
        == [
            f"UserError: Process {refuses} cannot go on: --a is no option.\n"
            f"Process {refuses} cannot go on: --b is none."
        ]
        * 2
    )


def test_one_that_comes_late_hears_it_too() -> None:
    job, error = Job(3), UserError("no.")
    late = job.process(2)
    said = told(job.process(0, refused=error), job.process(1), lambda: (time.sleep(1), late()))
    assert said == ["", *["UserError: Process 0 cannot go on: no."] * 2]


def test_two_with_one_number_hear_it_both() -> None:
    job = Job(3)
    zero, *twins = told(job.process(0, 2), job.process(1), job.process(1))
    assert zero.startswith("UserError: Two processes have process_id=1")
    assert twins == [zero] * 2


def test_one_goes_away() -> None:
    job = Job(3)
    one, zero, _ = told(job.process(1), job.process(0, 3), job.says(hello(2, 3)))
    assert one == zero == "RetryableError: Process 2 went away before all had come."


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (hello(1, 4), "num_processes is 2 on process 0 and 4 on process 1; start the same command"),
        (hello(7, 2), "Two processes have process_id=7"),
    ],
)
def test_they_do_not_belong_together(other: bytes, problem: str) -> None:
    job = Job(2)
    zero, _ = told(job.process(0, 1), job.says(other))
    assert zero.startswith(f"UserError: {problem}")
