"""Checkpoints behind HTTP, read by byte range into the buffers that go to the devices."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Lock

import numpy as np

from maxconv.algebra.boxes import Box
from maxconv.algebra.storage import coalesce, runs
from maxconv.errors import ConversionError, UserError
from maxconv.sources import http
from maxconv.sources.base import TensorInfo, Traffic
from maxconv.sources.concurrency import MOST, Flow
from maxconv.sources.files import FileSource
from maxconv.sources.http import Fault, patiently
from maxconv.sources.safetensors import PREFIX, StoredTensor, check_size, header_length

SPAN = 64 << 20  # bytes that one request brings at most
PART = 8 << 20  # bytes that are worth a request of their own, if there may be more at once
GAP = 1 << 20  # bytes: gaps up to this are read through rather than splitting the request
PIECE = 1 << 20  # bytes that are taken from a connection at once, and copied
HEAD = 256 << 10  # bytes of a file that are read at first: most headers are shorter

_DENIED = (401, 403, 404, 410, 412)

_Run = tuple[int, int]  # where it begins in the file, and in the buffer
Span = tuple[int, int, Sequence[_Run]]  # first and last byte + 1 of a request, and what it brings


class RemoteSource(FileSource):
    """Files that a server gives in ranges.

    Every answer must be the range that was asked for, of the file that was there at first. What may
    pass (a server that is busy or failing, a broken connection, a short or wrong answer) is tried
    again `max_retries` times. Once reading a tensor has failed for good, all reads fail: those that
    wait for their turn would only find out as slowly as the first.
    """

    block = SPAN
    readers = 8  # small tensors each wait for the network
    is_shared = True

    def __init__(self, max_retries: int):
        super().__init__()
        self._max_retries = max_retries
        self._flow = Flow()
        self._traffic, self._lock = Traffic(), Lock()
        self._http = http.Client(MOST)
        self._failure: Exception | None = None
        self._pool = ThreadPoolExecutor(MOST, "ranges")

    @abstractmethod
    def _location(self, file: str, is_stale: bool) -> tuple[str, Mapping[str, str]]:
        """Where a file is to be read, and the headers to ask with; again if the last `is_stale`.

        Raises:
            OSError: when it is there no more, in a sentence.
        """

    @abstractmethod
    def _size(self, file: str) -> int:
        """Bytes of a file; UserError when there is none of that name."""

    def _refusal(self, file: str, status: int) -> str | None:
        """Why a server denies a file, in a sentence; None when its address is just out of date."""

    def _is_same(self, file: str, headers: Mapping[str, str]) -> bool:
        """Whether an answer is of the file that was there at first, as far as it says."""
        return True

    def _changed(self, file: str) -> str:
        return (
            f"{file} in {self.root} was replaced or removed while it was read; nothing may change "
            "a checkpoint that is being converted"
        )

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def allow(self, nbytes: int) -> None:
        self._flow.budget = nbytes

    def held(self, ahead: int) -> int:
        """Requests, too, that bring several runs hold what they bring, with what is between."""
        return super().held(ahead) + max(self._flow.budget, SPAN)

    def _add(self, traffic: Traffic) -> None:
        with self._lock:
            self._traffic = self._traffic.plus(traffic)

    def _content(self, file: str) -> bytes:
        size = self._size(file)
        check_size(size, f"{file} in {self.root}")
        with told():
            return self._head(file, 0, size)

    def _header(self, file: str) -> tuple[bytes, int]:
        size = self._size(file)
        with told():
            raw = self._head(file, 0, min(HEAD, size))
            end = PREFIX + header_length(raw[:PREFIX], size)
            return raw[:end] + self._head(file, len(raw), end), size

    def _head(self, file: str, start: int, stop: int) -> bytes:
        raw = bytearray(max(0, stop - start))
        if raw:
            self._add(Traffic(headers=len(raw)))
            self._get(file, start, memoryview(raw))
        return bytes(raw)

    def _fetch(
        self, stored: StoredTensor, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        def bring(span: Span) -> None:
            start, stop, runs = span
            with self._flow.request(stop - start), self._failing_together():
                if len(runs) == 1:
                    at = runs[0][1]
                    self._get(stored.file, start, buffer[at : at + stop - start])
                    return
                raw = memoryview(bytearray(stop - start))
                self._add(Traffic(between=len(raw) - len(runs) * nbytes))
                self._get(stored.file, start, raw)
                for offset, at in runs:
                    buffer[at : at + nbytes] = raw[offset - start : offset - start + nbytes]

        # What is long is shared by as many requests as may be in flight.
        most = min(SPAN, max(PART, -(-len(buffer) // self._flow.limit)))
        for _ in self._pool.map(bring, spans(offsets, nbytes, most)):
            pass

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Keeps an error, so that requests that wait or are tried again end with it, too."""
        self._check_failure()
        try:
            yield
        except (ConversionError, OSError) as error:
            self._failure = self._failure or error
            raise

    def _check_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def between(self, info: TensorInfo, boxes: Sequence[Box]) -> int:
        itemsize = self.stored[info.name].dtype.itemsize
        return _between(info.shape, tuple(boxes), itemsize)

    def _get(self, file: str, start: int, into: memoryview) -> None:
        """Fills `into` from byte `start` of a file."""
        patiently(
            f"{file} in {self.root} could not be read",
            self._max_retries,
            lambda is_stale: self._attempt(file, start, into, is_stale),
        )

    def _attempt(self, file: str, start: int, into: memoryview, is_stale: bool) -> None:
        self._check_failure()
        url, headers = self._location(file, is_stale)
        wanted = {"Range": f"bytes={start}-{start + len(into) - 1}"}
        self._add(Traffic(requests=1))
        answer = self._http.get(url, headers, kept=wanted)
        at, is_done = 0, False
        try:
            self._check(file, answer, start, len(into))
            while n := answer.readinto(into[at : at + PIECE]):
                at += n
            is_done = at == len(into) and not answer.read(1)
            if not is_done:
                raise Fault("the answer was cut off")
        finally:
            self._add(Traffic(nbytes=at))
            self._flow.came(at)
            answer.release_conn() if is_done else answer.close()

    def _check(self, file: str, answer: http.Response, start: int, nbytes: int) -> None:
        """Raises Fault when an answer may be another one next time, else OSError."""
        status = answer.status
        if status in http.BUSY:
            self._flow.busy()
        if status in http.RETRIED:
            raise Fault.of(status, answer.headers)
        if status == 200:
            raise Fault("the server sent the whole file instead of a range")
        if status in _DENIED:
            if sentence := self._refusal(file, status):
                raise OSError(sentence)
            raise Fault.of(status, answer.headers, is_stale=True)
        if status != 206:
            raise OSError(f"{file} cannot be read: the server answered {status}")
        said = answer.headers.get("Content-Range") or ""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", said)
        if found is None or (int(found[1]), int(found[2])) != (start, start + nbytes - 1):
            raise Fault("the server sent another range")
        if found[3] not in ("*", str(self._size(file))) or not self._is_same(file, answer.headers):
            raise OSError(self._changed(file))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.close()


@contextmanager
def told() -> Iterator[None]:
    """Turns what a server denies into a sentence about bad input: nothing is written yet."""
    try:
        yield
    except OSError as error:
        raise UserError(str(error)) from None


@cache
def _between(shape: Sequence[int], boxes: Sequence[Box], itemsize: int) -> int:
    """Bytes that lie between the runs of a tensor's boxes, where they are near each other."""
    total = 0
    for box in coalesce(boxes):
        offsets, nbytes = runs(shape, box, itemsize)
        gaps = np.diff(offsets) - nbytes
        total += int(gaps[gaps <= GAP].sum())
    return total


def spans(offsets: Sequence[int], nbytes: int, most: int = SPAN) -> Iterator[Span]:
    """The requests that bring runs of `nbytes` at ascending `offsets`, one after another.

    Each spans `most` bytes at most: a longer run is cut.
    """
    at = 0
    runs: list[_Run] = []
    for offset in offsets:
        if nbytes > most:
            for first in range(0, nbytes, most):
                stop = offset + min(first + most, nbytes)
                yield offset + first, stop, [(offset + first, at + first)]
        else:
            if runs and (
                offset - runs[-1][0] - nbytes > GAP or offset + nbytes - runs[0][0] > most
            ):
                yield runs[0][0], runs[-1][0] + nbytes, runs
                runs = []
            runs.append((offset, at))
        at += nbytes
    if runs:
        yield runs[0][0], runs[-1][0] + nbytes, runs
