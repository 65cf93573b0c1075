"""Which process makes which whole arrays, when each is to be written by one process.

What can be divided along an axis is: each process has a block of equal length, the last ones less
or nothing. What cannot, or is small, is one process' own. Blocks go to the processes that have
least so far, so that all end with about equally many bytes.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

SMALL = 1 / 50  # of an even share: what is smaller is not divided
PADDED = 1.3  # times as long as the axis: longest blocks that may even out what others have
MOST_PADDED = 4


@dataclass(frozen=True)
class Unit:
    """Arrays that are made from the same bytes.

    Attributes:
        nbytes: of all of them.
        axes: along which they can be divided: the axis, its length, and whether blocks may reach
            past its end.
    """

    nbytes: int
    axes: tuple[tuple[int, int, bool], ...] = ()


@dataclass(frozen=True)
class Division:
    """How a unit is divided.

    Attributes:
        axis: along which it is; None if one process has all of it.
        n: length of the axis, else 1.
        block: length of a block.
        order: the process of each block.
    """

    axis: int | None
    n: int
    block: int
    order: tuple[int, ...] = ()

    def owner(self, at: int) -> int:
        """The process that has an array, by its place on the axis."""
        return self.order[at // self.block]


_WHOLE = Division(None, 1, 1)


def divided(units: Sequence[Unit], processes: int) -> list[Division]:
    """Divides units among processes, in shares of bytes as even as possible."""
    share = sum(unit.nbytes for unit in units) / processes
    possible = [_possible(unit, processes, share) for unit in units]
    chosen = [choices[0] for choices in possible]
    found, loads = _placed(units, chosen, processes)
    tried = ((i, choice) for i, choices in enumerate(possible) for choice in choices[1:])
    for i, choice in tried:
        if max(loads) <= (1 + SMALL) * share:
            break
        others = [*chosen[:i], choice, *chosen[i + 1 :]]
        if _unevenness(placed := _placed(units, others, processes)) < _unevenness((found, loads)):
            chosen, (found, loads) = others, placed
    return found


def _possible(unit: Unit, processes: int, share: float) -> list[Division]:
    """Ways to divide a unit, that with the shortest blocks first."""
    if processes == 1 or unit.nbytes <= SMALL * share:
        return [_WHOLE]
    found: dict[float, list[Division]] = {}
    for axis, n, may_pad in unit.axes:
        least = -(-n // processes)
        blocks = range(least, max(least, int(PADDED * n / processes)) + 1)
        choices = [Division(axis, n, b) for b in blocks if may_pad or b * processes == n]
        if choices and least * processes <= MOST_PADDED * n:
            found.setdefault(choices[0].block * processes / n, choices)
    return found[min(found)] if found else [_WHOLE]


def _unevenness(placed: tuple[object, Sequence[float]]) -> float:
    return sum(load * load for load in placed[1])


def _placed(
    units: Sequence[Unit], chosen: Sequence[Division], processes: int
) -> tuple[list[Division], list[float]]:
    """Gives the largest blocks to the processes first; also returns the bytes that each has."""
    found = [*chosen]
    each = [unit.nbytes / way.n for unit, way in zip(units, found, strict=True)]
    loads = [(0.0, process) for process in range(processes)]
    for i in sorted(range(len(units)), key=lambda i: -each[i] * found[i].block):
        way = found[i]
        if way.axis is None:
            load, process = loads[0]
            heapq.heapreplace(loads, (load + each[i], process))
            found[i] = Division(None, 1, 1, (process,))
            continue
        loads.sort()
        order = tuple(process for _, process in loads)
        counts = (min(way.block, max(0, way.n - k * way.block)) for k in range(processes))
        loads = [(load + each[i] * n, p) for (load, p), n in zip(loads, counts, strict=True)]
        heapq.heapify(loads)
        found[i] = Division(way.axis, way.n, way.block, order)
    return found, [load for load, _ in loads]
