"""Computes slabs of leaves: reads ahead, moves raw bytes to the devices, runs compiled cells.

One byte budget, the window, bounds the memory of a process: half of it is for data read ahead, the
rest for the slab that is being computed and those that are being written (targets/streaming.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import jax
import numpy as np

from maxconv.algebra import Box, clip, dims, slices, volume
from maxconv.execution import malloc
from maxconv.execution.memory import host_memory
from maxconv.execution.program import Programs, bits, typed
from maxconv.execution.timeline import span
from maxconv.planning.cells import Step
from maxconv.planning.placement import local_boxes
from maxconv.planning.plan import Plan
from maxconv.planning.slabs import Slab
from maxconv.sources import Part, Source, aligned_empty


@dataclass
class Stats:
    """What an engine has done in this process. Reads are counted by the source.

    `ahead` and `peak_ahead` are bytes of steps that have been or are being read, but not yet run.
    """

    steps: int = 0
    ahead: int = 0
    peak_ahead: int = 0


class Engine:
    """Computes the slabs of a plan, ideally in its order, in which it reads ahead.

    A context manager. Use it from one thread at a time: cells with collectives must be launched in
    the same order on all processes.
    """

    def __init__(
        self,
        plan: Plan,
        source: Source,
        window: int,
        programs: Programs | None = None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        """Starts to read and to compile.

        Args:
            plan: what is made.
            source: what it is made of.
            window: the budget, in bytes per process.
            programs: shared with other engines.
            together: is entered wherever a process waits for its reads, before it runs a program
                with the others: an error that is raised there can be raised on all.
        """
        self.stats = Stats()
        malloc.trim()
        self._most = host_memory() + window + window // 4  # the last for temporaries of cells
        self.programs = Programs(plan.recipes) if programs is None else programs
        self._owns_programs = programs is None
        self._ahead = _ReadAhead(plan, source, window // 2, self.stats, together)

    def make_slabs(self, slabs: Sequence[Slab]) -> list[jax.Array]:
        """Computes a slab, or all slabs of a group, as global arrays in their leaves' shardings."""
        wholes = list({id(slab.made): slab.made for slab in slabs}.values())
        arrays: list[Any] = [None] * len(wholes)
        for steps in zip(*(slab.steps for slab in wholes), strict=True):
            malloc.trim(self._most)
            with self._ahead.take(steps[0]) as reads:
                for i, step in enumerate(steps):
                    arrays[i] = self._run(step, arrays[i], reads)
        made: dict[int, jax.Array] = {}
        for whole in wholes:
            places = [i for i, slab in enumerate(slabs) if slab.made is whole]
            made |= zip(places, self._taken([slabs[i] for i in places], arrays.pop(0)), strict=True)
        return [typed(made.pop(i), slab.dtype) for i, slab in enumerate(slabs)]

    def _taken(self, slabs: Sequence[Slab], whole: jax.Array) -> Sequence[jax.Array]:
        """The places of a stack that slabs are."""
        if slabs[0].stack is None:
            return [whole]
        places = tuple(slab.place for slab in slabs)
        return self.programs.places(whole, slabs[0].sharding, places)(whole)

    def _run(self, step: Step, into: jax.Array | None, reads: Sequence[jax.Array]) -> jax.Array:
        """Runs a step; returns the slab with its output written into it."""
        self.stats.steps += 1
        recipe = step.recipe
        if recipe.is_read:
            return reads[0]
        run = self.programs.cell(recipe)
        with span("compute", _name(step), recipe.made_nbytes):
            if recipe.is_whole:
                array = run(*reads)
            else:
                if into is None:
                    into = self.programs.blank(recipe)()
                array = run(into, np.array(step.offset, np.int32), *reads)
            array.block_until_ready()  # then its inputs can be freed
        return array

    def close(self) -> None:
        """Stops reading and compiling."""
        self._ahead.close()
        if self._owns_programs:
            self.programs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ReadAhead:
    """Reads the steps of a plan in order, as far ahead as `limit` bytes allow."""

    def __init__(
        self,
        plan: Plan,
        source: Source,
        limit: int,
        stats: Stats,
        together: Callable[[], AbstractContextManager[None]],
    ):
        self._source, self._limit, self._stats = source, limit, stats
        self._together = together
        self._to_come = deque(plan.readings)
        self._queue: deque[tuple[Step, Future[list[jax.Array]]]] = deque()
        self._pool = ThreadPoolExecutor(source.readers, thread_name_prefix="read")

    @contextmanager
    def take(self, step: Step) -> Iterator[list[jax.Array]]:
        """The inputs of a step, on its devices; they count as held until the block ends."""
        self._top_up()
        reads = list[jax.Array]()
        with self._together():
            if self._queue and self._queue[0][0] is step:
                with span("wait", "for a read"):
                    reads = self._queue.popleft()[1].result()
            else:  # out of order: nothing was read ahead
                self._hold(step.recipe.buffer_nbytes)
                reads = _fetch(self._source, step)
        yield reads
        self._hold(-step.recipe.buffer_nbytes)
        del reads
        self._top_up()

    def _top_up(self) -> None:
        while self._to_come:
            nbytes = self._to_come[0].recipe.buffer_nbytes
            if self._stats.ahead and self._stats.ahead + nbytes > self._limit:
                return
            self._hold(nbytes)
            step = self._to_come.popleft()
            self._queue.append((step, self._pool.submit(_fetch, self._source, step)))

    def _hold(self, nbytes: int) -> None:
        self._stats.ahead += nbytes
        self._stats.peak_ahead = max(self._stats.peak_ahead, self._stats.ahead)

    def close(self) -> None:
        self._to_come.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._queue.clear()


def _fetch(source: Source, step: Step) -> list[jax.Array]:
    """Reads the inputs of a step, as global arrays of unsigned bits; or what it makes."""
    return [_fetch_one(source, step, i) for i in range(len(step.recipe.reads))]


def _fetch_one(source: Source, step: Step, i: int) -> jax.Array:
    read = step.recipe.reads[i]
    shape, sharding = read.as_read
    dtype = bits(read.dtype)
    if step.recipe.is_read:
        dtype, sharding = step.recipe.dtype, step.recipe.sharding
    boxes = local_boxes(sharding, shape)
    host: dict[Box, np.ndarray] = {}
    parts: dict[str, list[Part]] = {}
    for box in set(boxes.values()):  # devices that need the same box share its bytes
        pieces = [*step.filling(i, box)]
        insides = [clip(of.box, source.tensors[of.name].shape) for _, of in pieces]
        # Aligned, so that a CPU device can use the memory without a copy.
        is_short = sum(map(volume, insides)) < volume(box)
        host[box] = memory = aligned_empty(dims(box), bits(read.dtype), zero=is_short)
        buffer = memory.reshape(read.buffer(box))
        for (within, of), inside in zip(pieces, insides, strict=True):
            held = buffer[(*slices(within), ...)].reshape(dims(of.box))  # without the axis of lanes
            parts.setdefault(of.name, []).append((inside, held[(*slices(inside, of.box), ...)]))
    nbytes = sum(memory.nbytes for memory in host.values())
    for name, boxes_of in parts.items():
        with span("read", name, sum(part.nbytes for _, part in boxes_of)):
            source.read(source.tensors[name], boxes_of)
    with span("to device", _name(step), nbytes):
        shards = [jax.device_put(host[box].view(dtype), device) for device, box in boxes.items()]
        return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _name(step: Step) -> str:
    """The name of a step in a timeline: the first tensor that it reads."""
    return step.sources[0][0].name if step.sources else "constant"
