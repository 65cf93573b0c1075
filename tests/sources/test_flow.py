"""How many requests go at once to a source: simulated, so that its speed is known."""

import heapq

import pytest

from maxconv.sources import concurrency
from maxconv.sources.concurrency import BUDGET, FIRST, MOST, Flow

MIB = 1 << 20


class Simulated:
    """A source that gives each request so much, and all of them together so much, in MiB/s."""

    def __init__(self, each: float, together: float, nbytes: int = 8 * MIB):
        self.each, self.together, self.nbytes = each * MIB, together * MIB, nbytes
        self.now = 0.0
        self.flow = Flow(1 << 40, clock=lambda: self.now)

    def run(self, seconds: float) -> list[int]:
        """Asks as often as it may; returns the limits that were met."""
        ends: list[float] = []
        open_requests = []
        limits = []
        until = self.now + seconds
        while self.now < until:
            while self.flow._may_go(self.nbytes):
                request = self.flow.request(self.nbytes)
                request.__enter__()
                open_requests.append(request)
                rate = min(self.each, self.together / len(open_requests))
                heapq.heappush(ends, self.now + self.nbytes / rate)
            self.now = heapq.heappop(ends)
            self.flow.came(self.nbytes)
            open_requests.pop().__exit__(None, None, None)
            limits.append(self.flow.limit)
        return limits


def test_a_source_that_serves_requests_apart_is_asked_for_all_at_once() -> None:
    source = Simulated(each=50, together=10_000)
    source.run(30)
    assert source.flow.limit == MOST


@pytest.mark.parametrize("enough", [4, 10])
def test_requests_that_bring_nothing_are_not_made(enough: int) -> None:
    """Beyond `enough` requests they only share what there is."""
    source = Simulated(each=50, together=50 * enough)
    source.run(30)
    later = source.run(60)
    assert max(later) <= 2 * enough
    assert sum(later) / len(later) >= 0.7 * min(enough, 8)


def test_a_busy_source_is_asked_less_and_then_more_again() -> None:
    source = Simulated(each=50, together=10_000)
    source.run(30)
    for _ in range(MOST):  # as all of them are told so
        source.flow.busy()
    assert source.flow.limit == MOST // 2
    source.now += concurrency.ROUND
    source.flow.busy()
    assert source.flow.limit == MOST // 4
    assert source.run(5)[-1] <= MOST // 4 + 1
    assert source.run(100)[-1] > MOST // 2
    for _ in range(9):
        source.now += concurrency.ROUND
        source.flow.busy()
    assert source.flow.limit == 1


def test_rounds_without_a_wait_say_nothing() -> None:
    """Who asks for little, for he has no room for more, learns nothing of the source."""
    now = 0.0
    quiet = Flow(clock=lambda: now)
    for _ in range(100):
        with quiet.request(MIB):
            now += concurrency.ROUND
        quiet.came(MIB)
    assert quiet.limit == FIRST


def test_one_budget_bounds_all_requests() -> None:
    bounded = Flow()
    with bounded.request(2 * BUDGET):  # one may always go
        assert not bounded._may_go(1)
    with bounded.request(BUDGET - 1):
        assert bounded._may_go(1) and not bounded._may_go(2)
        bounded.budget += 1
        assert bounded._may_go(2)
