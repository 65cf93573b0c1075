"""Checkpoints behind HTTP, read with ranged requests into the buffers that go to the devices."""

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

SPAN = 64 << 20  # maximum bytes per request
PART = 8 << 20  # minimum bytes for splitting a read into concurrent requests
GAP = 1 << 20  # bytes: gaps up to this are read through rather than splitting the request
PIECE = 1 << 20  # bytes that are read from a connection at once
HEAD = 256 << 10  # bytes of a file that the first request reads: most headers are shorter

_DENIED = (401, 403, 404, 410, 412)

_Run = tuple[int, int]  # offset in the file, offset in the buffer
Span = tuple[int, int, Sequence[_Run]]  # start and end of a request's range, and the runs in it


class RemoteSource(FileSource):
    """Files on a server that supports ranged requests.

    Every response must be the requested range of the file as it was when the source was opened.
    Transient failures (a busy or failing server, a broken connection, a short or wrong response)
    are retried `max_retries` times. Once a read has failed for good, all other reads fail at once,
    rather than each after its own retries.
    """

    block = SPAN
    readers = 8  # each small tensor waits for the network
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
        """The URL and request headers of a file; a new URL if the last one `is_stale`.

        Raises:
            OSError: the file does not exist any more; the message is a sentence.
        """

    @abstractmethod
    def _size(self, file: str) -> int:
        """Size of a file in bytes; UserError if there is none of that name."""

    def _refusal(self, file: str, status: int) -> str | None:
        """Why a server denies a file, in a sentence; None if only the URL has expired."""

    def _is_same(self, file: str, headers: Mapping[str, str]) -> bool:
        """Whether a response is of the file as it was when opened, according to its headers."""
        return True

    def _changed(self, file: str) -> str:
        return (
            f"{file} in {self.root} was replaced or removed while it was being read; a checkpoint "
            "must not change while it is being converted"
        )

    @property
    def traffic(self) -> Traffic:
        return self._traffic

    def allow(self, nbytes: int) -> None:
        self._flow.budget = nbytes

    def held(self, ahead: int) -> int:
        """Also a buffer for each request that covers several runs and the gaps between them."""
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

        # A long read is split into as many requests as may be in flight.
        most = min(SPAN, max(PART, -(-len(buffer) // self._flow.limit)))
        for _ in self._pool.map(bring, spans(offsets, nbytes, most)):
            pass

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Records an error, so that requests that are waiting or being retried fail with it too."""
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
                raise Fault("the response was cut off")
        finally:
            self._add(Traffic(nbytes=at))
            self._flow.came(at)
            answer.release_conn() if is_done else answer.close()

    def _check(self, file: str, answer: http.Response, start: int, nbytes: int) -> None:
        """Raises Fault if a retry may help, else OSError."""
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
            raise Fault("the server sent a different range")
        if found[3] not in ("*", str(self._size(file))) or not self._is_same(file, answer.headers):
            raise OSError(self._changed(file))

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._http.close()


@contextmanager
def told() -> Iterator[None]:
    """Turns an OSError into a UserError: nothing has been written yet."""
    try:
        yield
    except OSError as error:
        raise UserError(str(error)) from None


@cache
def _between(shape: Sequence[int], boxes: Sequence[Box], itemsize: int) -> int:
    """Bytes in gaps of at most `GAP` between the runs of a tensor's boxes."""
    total = 0
    for box in coalesce(boxes):
        offsets, nbytes = runs(shape, box, itemsize)
        gaps = np.diff(offsets) - nbytes
        total += int(gaps[gaps <= GAP].sum())
    return total


def spans(offsets: Sequence[int], nbytes: int, most: int = SPAN) -> Iterator[Span]:
    """The requests for runs of `nbytes` bytes at ascending `offsets`.

    Each covers at most `most` bytes; longer runs are split.
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
