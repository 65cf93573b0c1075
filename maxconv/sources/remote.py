"""Checkpoints behind HTTP, read by byte range into the buffers that go to the devices."""

import random
import re
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import urllib3

from maxconv.errors import RetryableError
from maxconv.sources.files import FileSource
from maxconv.sources.safetensors import PREFIX, TensorInfo, header_length

SPAN = 64 << 20  # bytes that one request brings at most
GAP = 1 << 20  # bytes between two runs that are rather read than asked around
IN_FLIGHT = 8  # requests at once, in a process
HEAD = 256 << 10  # bytes of a file that are read at first: most headers are shorter

_RETRIED = (408, 425, 429, 500, 502, 503, 504)
_DENIED = (401, 403, 404, 410)  # by a store of files, to a signed address that is out of date
_LONGEST = 30  # seconds between two attempts, unless the server asks for more

_Run = tuple[int, int]  # where it begins in the file, and in the buffer
Span = tuple[int, int, Sequence[_Run]]  # first and last byte + 1 of a request, and what it brings


class RemoteSource(FileSource):
    """Files that a server gives in ranges.

    Every answer must be the range that was asked for. What may pass (a server that is busy or
    failing, a broken connection, a short or wrong answer) is tried again `max_retries` times.
    `served`: bytes that came, with what lay between the runs.
    """

    block = SPAN

    def __init__(self, max_retries: int):
        super().__init__()
        self.served = 0
        self._max_retries = max_retries
        self._http = urllib3.PoolManager(
            maxsize=IN_FLIGHT, retries=False, timeout=urllib3.Timeout(connect=10, read=60)
        )
        self._pool = ThreadPoolExecutor(IN_FLIGHT, "ranges")

    @abstractmethod
    def _location(self, file: str, is_stale: bool) -> tuple[str, Mapping[str, str]]:
        """Where a file is to be read, and the headers to ask with; anew if the last `is_stale`."""

    @abstractmethod
    def _size(self, file: str) -> int:
        """Bytes of a file; UserError when there is none of that name."""

    def _content(self, file: str) -> bytes:
        return self._bytes(file, 0, self._size(file))

    def _header(self, file: str) -> tuple[bytes, int]:
        size = self._size(file)
        raw = self._bytes(file, 0, min(HEAD, size))
        end = PREFIX + header_length(raw[:PREFIX], size)
        return raw[:end] + self._bytes(file, len(raw), end), size

    def _bytes(self, file: str, start: int, stop: int) -> bytes:
        raw = bytearray(max(0, stop - start))
        if raw:
            self._get(file, start, memoryview(raw))
        return bytes(raw)

    def _fetch(
        self, info: TensorInfo, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        def bring(span: Span) -> None:
            start, stop, runs = span
            if len(runs) == 1:
                at = runs[0][1]
                self._get(info.file, start, buffer[at : at + stop - start])
                return
            raw = memoryview(self._bytes(info.file, start, stop))
            for offset, at in runs:
                buffer[at : at + nbytes] = raw[offset - start : offset - start + nbytes]

        for _ in self._pool.map(bring, spans(offsets, nbytes)):
            pass

    def _get(self, file: str, start: int, into: memoryview) -> None:
        """Fills `into` from byte `start` of a file."""
        is_stale = False
        for attempt in count():
            fault, is_stale, wait = self._attempt(file, start, into, is_stale)
            if fault is None:
                return
            if attempt == self._max_retries:
                raise RetryableError(
                    f"{file} in {self.root} could not be read: {fault}, {attempt + 1} times; "
                    "try again, or give more --max_retries."
                )
            delay = min(_LONGEST, 2**attempt / 2) * random.uniform(0.5, 1.5)
            time.sleep(max(wait, delay))

    def _attempt(
        self, file: str, start: int, into: memoryview, is_stale: bool
    ) -> tuple[str | None, bool, float]:
        """What went wrong, if anything; whether the address is stale; seconds to wait."""
        try:
            url, headers = self._location(file, is_stale)
            asked = {**headers, "Range": f"bytes={start}-{start + len(into) - 1}"}
            answer = self._http.request(
                "GET", url, headers=asked, preload_content=False, redirect=False
            )
            try:
                wait = _seconds(answer.headers.get("Retry-After"))
                if answer.status in _DENIED:
                    return f"the server answered {answer.status}", True, wait
                if answer.status != 206:
                    return _complaint(file, answer.status), False, wait
                if not _is_range(answer.headers.get("Content-Range"), start, len(into)):
                    return "the server sent another range", False, wait
                at = 0
                while at < len(into) and (n := answer.readinto(into[at:])):
                    at += n
                self.served += at
                if at == len(into) and not answer.read(1):
                    return None, False, 0
                return "the answer was cut off", False, wait
            finally:
                answer.release_conn() if answer.status == 206 else answer.close()
        except urllib3.exceptions.HTTPError as error:
            return f"the connection failed ({type(error).__name__})", False, 0

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.clear()


def spans(offsets: Sequence[int], nbytes: int) -> Iterator[Span]:
    """The requests that bring runs of `nbytes` at ascending `offsets`, one after another."""
    at = 0
    runs: list[_Run] = []
    for offset in offsets:
        if nbytes > SPAN:
            for first in range(0, nbytes, SPAN):
                stop = offset + min(first + SPAN, nbytes)
                yield offset + first, stop, [(offset + first, at + first)]
        else:
            if runs and (
                offset - runs[-1][0] - nbytes > GAP or offset + nbytes - runs[0][0] > SPAN
            ):
                yield runs[0][0], runs[-1][0] + nbytes, runs
                runs = []
            runs.append((offset, at))
        at += nbytes
    if runs:
        yield runs[0][0], runs[-1][0] + nbytes, runs


def _complaint(file: str, status: int) -> str:
    if status == 200:
        return "the server sent the whole file instead of a range"
    if status in _RETRIED:
        return f"the server answered {status}"
    raise OSError(f"{file} cannot be read: the server answered {status}")


def _is_range(said: str | None, start: int, nbytes: int) -> bool:
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", said or "")
    return found is not None and (int(found[1]), int(found[2])) == (start, start + nbytes - 1)


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after and retry_after.isdigit() else 0
