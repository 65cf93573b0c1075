"""HTTP with bounds on every wait, on the size of answers, and on who gets to see a token.

Transient failures (a busy or failing server, a broken connection) are retried. No answer may take
longer than `READ` seconds plus the time for its bytes at `LEAST` bytes per second.
"""

import http.client
import io
import random
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urljoin, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from maxconv.errors import RetryableError

RETRIED = (408, 425, 429, 500, 502, 503, 504)
BUSY = (429, 503)  # of these, those with which a server reports overload
CONNECT, READ = 10, 30  # seconds: to connect; of silence, and for the headers of an answer
LEAST = 16 << 10  # minimum bytes per second of a response body, after READ seconds
CALL = 120  # seconds for an API call as a whole, without its uploads
UPLOAD = 256 << 10  # minimum bytes per second of an upload
MOST_ASKED = 60  # longest Retry-After that is honoured, in seconds: rate limits are per minute
MOST_DATA = 100_000_000  # bytes of an API's answer

_LONGEST = 30  # seconds between two attempts, unless the server asks for more
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 10
_PORTS = {"http": 80, "https": 443}
AGAIN = "try again, or give more --max_retries"

Answer = TypeVar("Answer")
Response = urllib3.BaseHTTPResponse


class Fault(Exception):
    """A transient failure: `wait` is in seconds; `is_stale` if the URL has to be resolved again."""

    def __init__(self, said: str, wait: float = 0, is_stale: bool = False):
        super().__init__(said)
        self.wait, self.is_stale = wait, is_stale

    @classmethod
    def of(cls, status: int, headers: Mapping[str, str], is_stale: bool = False) -> "Fault":
        """The fault of an answer with this status."""
        wait = retry_after(headers.get("Retry-After") or "")
        return cls(f"the server answered {status}", wait, is_stale)


def retry_after(text: str) -> float:
    """Seconds that a Retry-After header asks for (RFC 9110, 10.2.3): a number, or a date.

    At most `MOST_ASKED`; 0 if it is malformed.
    """
    if text.isascii() and text.isdecimal():
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return 0
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0), MOST_ASKED)


def patiently(
    what: str, max_retries: int, attempt: Callable[[bool], Answer], mend: str = AGAIN
) -> Answer:
    """Calls `attempt` until it succeeds, with exponential backoff; returns its result.

    Args:
        what: the beginning of the error message.
        max_retries: attempts after the first.
        attempt: raises Fault, or an error of urllib3, if it may succeed later. Its argument says
            whether URLs are stale.
        mend: the end of the error message.

    Raises:
        RetryableError: the last attempt failed as well.
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
            raise RetryableError(f"{what}: {fault}, {n + 1} times; {mend}.")
        is_stale = fault.is_stale
        time.sleep(max(fault.wait, min(_LONGEST, 2**n / 2) * random.uniform(0.5, 1.5)))
    raise AssertionError


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """The result of a call into a library that has no timeout of its own.

    Raises:
        TimeoutError: it took longer; the call goes on in a background thread.
    """
    result: Future[Answer] = Future()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    Thread(target=run, name="call", daemon=True).start()
    return result.result(seconds)


class Client:
    """A client for up to `connections` threads at once; it does not retry."""

    def __init__(self, connections: int):
        timeout = urllib3.Timeout(connect=CONNECT, read=READ)
        self.pools = urllib3.PoolManager(maxsize=connections, retries=False, timeout=timeout)
        self.pools.pool_classes_by_scheme = {"http": _HTTPPool, "https": _HTTPSPool}

    def ask(self, method: str, url: str, headers: Mapping[str, str]) -> Response:
        """A response of which only the headers have been read; redirects are not followed.

        Raises:
            urllib3.exceptions.HTTPError: the connection fails, or is too slow.
        """
        return self.pools.request(
            method, url, headers=headers, preload_content=False, redirect=False
        )

    def get(self, url: str, headers: Mapping[str, str], kept: Mapping[str, str]) -> Response:
        """Like `ask`, but follows redirects. `headers` are sent to the origin of `url` only, `kept`
        to every server.

        Raises:
            OSError: a redirect is not allowed, or there are too many.
        """
        for _ in range(_MOST_REDIRECTS):
            answer = self.ask("GET", url, {**headers, **kept})
            if (there := redirected(url, answer)) is None:
                return answer
            answer.close()
            url, headers = there, headers if same_origin(url, there) else {}
        raise OSError(f"{_place(url)} redirects more than {_MOST_REDIRECTS} times")

    def data(self, method: str, url: str, headers: Mapping[str, str]) -> tuple[Response, bytes]:
        """A response and its whole body."""
        answer = self.ask(method, url, headers)
        body = answer.read(MOST_DATA + 1)
        if len(body) > MOST_DATA:
            answer.close()
            raise Fault(f"the server sent more than {MOST_DATA:,} bytes")
        answer.release_conn()
        return answer, body

    def close(self) -> None:
        self.pools.clear()


def redirected(url: str, answer: Response) -> str | None:
    """The target of a redirect; None if the response is not one.

    Raises:
        OSError: the target is malformed, or leads from https to http, which is not secure.
    """
    there = answer.headers.get("Location")
    if answer.status not in _REDIRECTS or there is None:
        return None
    try:
        target = urljoin(url, there)
        before, after = origin(url)[0], origin(target)[0]
    except ValueError:
        raise OSError(f"{_place(url)} redirects to a malformed address") from None
    if after not in ("https", before) or after not in _PORTS:
        raise OSError(f"{_place(url)} redirects from {before} to {after}, which is not followed")
    return target


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port (RFC 6454); ValueError if it is not a URL."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or _PORTS.get(parts.scheme, 0)


def same_origin(one: str, other: str) -> bool:
    """Whether secrets for one URL may be sent to the other."""
    return origin(one) == origin(other)


def _place(url: str) -> str:
    """A URL without its query, which may contain a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{parts.path}"


class _Paced(io.RawIOBase):
    """A socket's bytes, with a minimum rate.

    The headers (including any number of 100 Continue) must arrive within READ seconds; the body
    may take longer the larger it is.
    """

    def __init__(self, raw: io.RawIOBase):
        self._raw, self._is_body = raw, False
        self._since, self._came = time.monotonic(), 0

    def begin_body(self) -> None:
        self._is_body, self._since, self._came = True, time.monotonic(), 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        n = self._raw.readinto(buffer)
        self._came += n or 0
        allowed = READ + self._came / LEAST * self._is_body
        if n and time.monotonic() - self._since > allowed:
            raise TimeoutError("the response arrives too slowly")
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response with a minimum rate."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._paced = _Paced(self.fp.detach())
        self.fp = io.BufferedReader(self._paced)

    def begin(self) -> None:
        super().begin()
        self._paced.begin_body()


class _HTTP(HTTPConnection):
    response_class = _Response


class _HTTPS(HTTPSConnection):
    response_class = _Response


class _HTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls: Any = _HTTP


class _HTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls: Any = _HTTPS
