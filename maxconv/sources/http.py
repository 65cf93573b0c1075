"""Asking servers again: what may pass is waited for, what does not is said."""

import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

import urllib3

from maxconv.errors import RetryableError

RETRIED = (408, 425, 429, 500, 502, 503, 504)
BUSY = (429, 503)  # of these: when the server has too much to do
CONNECT, READ = 10, 60  # seconds of silence after which a connection counts as broken

_LONGEST = 30  # seconds between two attempts, unless the server asks for more

Answer = TypeVar("Answer")


class Fault(Exception):
    """Something that may pass; `wait` is in seconds, `is_stale` says that an address is."""

    def __init__(self, said: str, wait: float = 0, is_stale: bool = False):
        super().__init__(said)
        self.wait, self.is_stale = wait, is_stale

    @classmethod
    def of(cls, answer: urllib3.BaseHTTPResponse, is_stale: bool = False) -> "Fault":
        """An answer that is none."""
        after = answer.headers.get("Retry-After") or ""
        wait = float(after) if after.isdigit() else 0
        return cls(f"the server answered {answer.status}", wait, is_stale)


def client(connections: int) -> urllib3.PoolManager:
    """What to ask with, from so many threads; it never asks again by itself."""
    timeout = urllib3.Timeout(connect=CONNECT, read=READ)
    return urllib3.PoolManager(maxsize=connections, retries=False, timeout=timeout)


def patiently(what: str, max_retries: int, attempt: Callable[[bool], Answer]) -> Answer:
    """What `attempt` returns once it meets no fault; it is told whether addresses are stale.

    Raises:
        RetryableError: naming `what`, when it still does after `max_retries` more attempts.
    """
    is_stale = False
    for n in count():
        try:
            return attempt(is_stale)
        except Fault as error:
            fault = error
        except urllib3.exceptions.HTTPError as error:
            fault = Fault(f"the connection failed ({type(error).__name__})")
        if n == max_retries:
            raise RetryableError(
                f"{what}: {fault}, {n + 1} times; try again, or give more --max_retries."
            )
        is_stale = fault.is_stale
        time.sleep(max(fault.wait, min(_LONGEST, 2**n / 2) * random.uniform(0.5, 1.5)))
    raise AssertionError
