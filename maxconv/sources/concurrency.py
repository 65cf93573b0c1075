"""How many requests are in flight at once: more, while that increases throughput."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Condition

FIRST, MOST = 4, 32  # requests at once, in a process
BUDGET = 128 << 20  # default for the total bytes of all requests in flight
ROUND = 0.5  # seconds over which throughput is measured, at least
HOLD = 20  # rounds before a concurrency that did not help is tried again
GAIN = 0.5  # fraction of a proportional gain in throughput that more requests must bring


class Flow:
    """Admits requests within one budget of bytes, and adapts their number.

    It starts with a few at once and doubles them while throughput improves, then adds one at a
    time. A step that does not help is undone; when the server reports that it is busy, the number
    is halved. Rounds in which no request had to wait tell nothing, and are not counted.
    """

    def __init__(self, budget: int = BUDGET, clock: Callable[[], float] = time.monotonic):
        self.limit = FIRST
        self.budget, self._clock = budget, clock
        self._turn = Condition()
        self._active = self._bytes = 0
        self._base, self._rate = FIRST, 0.0  # the last number that helped, and its bytes/s
        self._doubles, self._hold, self._halved = True, 0, -math.inf
        self._begin()

    @contextmanager
    def request(self, nbytes: int) -> Iterator[None]:
        """Waits until a request for `nbytes` is admitted."""
        with self._turn:
            while not self._may_go(nbytes):
                self._turn.wait()
            self._active += 1
            self._bytes += nbytes
        try:
            yield
        finally:
            with self._turn:
                self._active -= 1
                self._bytes -= nbytes
                self._turn.notify_all()

    def _may_go(self, nbytes: int) -> bool:
        self._is_wanted |= self._active >= self.limit
        fits = not self._active or self._bytes + nbytes <= self.budget
        return self._active < self.limit and fits

    def came(self, nbytes: int) -> None:
        """Counts bytes that arrived."""
        with self._turn:
            self._came += nbytes
            self._answers += 1
            took = self._clock() - self._since
            if took >= ROUND and self._answers >= self.limit:
                if self._is_wanted:
                    self._judge(self._came / took)
                self._begin()

    def busy(self) -> None:
        """Halves the number; of several busy answers within a round, only the first counts."""
        with self._turn:
            if self._clock() - self._halved < ROUND:
                return
            self._halved = self._clock()
            self.limit = self._base = max(1, self.limit // 2)
            self._rate, self._doubles, self._hold = 0.0, False, HOLD
            self._begin()

    def _begin(self) -> None:
        self._since, self._came, self._answers = self._clock(), 0, 0
        self._is_wanted = False

    def _judge(self, rate: float) -> None:
        """Adapts the number after a round with a throughput of `rate` bytes per second."""
        more = self.limit / self._base - 1
        if more and rate < self._rate * (1 + GAIN * more):
            self.limit, self._doubles, self._hold = self._base, False, HOLD
        elif self._hold:
            self._rate, self._hold = rate, self._hold - 1
        else:
            self._base, self._rate = self.limit, rate
            self.limit = min(MOST, self.limit * 2 if self._doubles else self.limit + 1)
            self._turn.notify_all()
