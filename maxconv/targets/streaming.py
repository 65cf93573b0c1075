"""A streaming Orbax save in MaxText's layout: leaves are computed while it runs.

A `LazyTensor` represents an array in the tree. Orbax writes its metadata at once and requests the
array when there is room in the window, so a save never holds the whole model. The result is what
Orbax writes for ordinary arrays, except for how OCDBT distributes them over its data files. This
uses private parts of Orbax, so it is only done with the releases in `maxconv.private.TESTED`.
"""

import asyncio
import contextvars
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from maxconv.algebra import Box, Shape, slices
from maxconv.execution.timeline import span
from maxconv.private.orbax import (
    array_leaf_handler,
    future,
    jax_array_handlers,
    leaf_registry,
    multihost,
    pytree_handler,
    replica_slices,
    serialize,
    types_v0,
)
from maxconv.processes import liveness
from maxconv.targets import journal
from maxconv.targets.base import Progress
from maxconv.targets.lazy import LazyTensor, Part
from maxconv.targets.orbax import TrainState, end_together

_ROWS = 4  # rows for concurrent writes in a timeline


class _Window:
    """Bytes that wait to be written: at most `size`, or those of one group of parts."""

    def __init__(self, size: int, progress: Progress):
        self._size, self._progress = size, progress
        self._changed = asyncio.Condition()

    async def take(self, nbytes: int) -> None:
        """Waits until there is room for so many bytes, and takes it."""

        def is_there() -> bool:
            held = self._progress.held
            return not held or held + nbytes <= self._size

        async with self._changed:
            with span("wait", "for room", thread="room"):
                await self._changed.wait_for(is_there)
        self._progress.hold(nbytes)

    async def give_back(self, nbytes: int) -> None:
        self._progress.hold(-nbytes)
        async with self._changed:
            self._changed.notify_all()


class _LazyArrayHandler(jax_array_handlers.ArrayHandler):
    """Orbax's array handler for lazy arrays: makes each when the window has room."""

    window: int
    progress: Progress
    kept: Mapping[str, Any]
    ready: Callable[[], None]

    async def serialize(
        self,
        values: Sequence[Any],  # LazyTensor
        infos: Sequence[types_v0.ParamInfo],
        args: Sequence[types_v0.SaveArgs] | None = None,
    ) -> Sequence[future.Future]:
        args = args or [types_v0.SaveArgs()] * len(values)
        types_v0.check_input_arguments(values, infos, args)
        jax_array_handlers.check_array_values(values, infos)
        work = {"lazy_array_handler": self._stream(list(values), infos, args)}
        if self._enable_write_sharding_file:
            work["serialize_shardings"] = jax_array_handlers._async_serialize_shardings(
                [v.sharding for v in values], infos, primary_host=self._primary_host
            )
        return [
            future.CommitFutureAwaitingContractedSignals(coroutine, name=name)
            for name, coroutine in work.items()
        ]

    async def _stream(
        self,
        values: list[Any],
        infos: Sequence[types_v0.ParamInfo],
        args: Sequence[types_v0.SaveArgs],
    ) -> None:
        with (
            liveness.all_or_none()
        ):  # on an error Orbax would wait for processes that wait for this one
            await self._make_and_write(values, infos, args)

    async def _make_and_write(
        self,
        values: Sequence[LazyTensor],
        infos: Sequence[types_v0.ParamInfo],
        args: Sequence[types_v0.SaveArgs],
    ) -> None:
        metadata = {i: self.kept[x.name] for i, x in enumerate(infos) if x.name in self.kept}
        await infos[0].await_path_creation()
        await asyncio.to_thread(self.progress.begun.wait)
        finished = journal.Journal(infos[0].parent_dir, bool(infos[0].is_ocdbt_checkpoint))
        window = _Window(self.window, self.progress)
        left = [len(value.parts) for value in values]
        rows = itertools.cycle(range(_ROWS))

        async def write(i: int, array: replica_slices.ReplicaSlices, cost: int) -> None:
            try:
                with span("write", values[i].name, cost, thread=f"write {next(rows)}"):
                    (metadata[i],) = await self._write(array, infos[i], args[i])
            finally:
                del array
                await window.give_back(cost)
            self.progress.written += cost
            left[i] -= 1
            if not left[i]:
                finished.add(metadata[i])
                self.progress.leaves += 1

        async with asyncio.TaskGroup() as writes:
            async for i, array, cost in self._made(values, window, left_out=frozenset(metadata)):
                writes.create_task(write(i, array, cost))
                del array
        finished.write()
        if self._array_metadata_store is not None:
            await self._array_metadata_store.write(
                checkpoint_dir=infos[0].parent_dir,
                array_metadatas=[metadata[i] for i in range(len(infos))],
                process_index=multihost.process_index(),
            )

    async def _made(
        self, values: Sequence[LazyTensor], window: "_Window", left_out: Container[int]
    ) -> AsyncIterator[tuple[int, replica_slices.ReplicaSlices, int]]:
        """The position of a leaf, a part of it in host memory, and the bytes that it holds."""
        # One thread: leaves are made in one order on all processes, as collectives must be.
        with ThreadPoolExecutor(1, thread_name_prefix="make") as maker:
            for group in _groups(values, left_out):
                await window.take(sum(part.local_nbytes for _, (_, part) in group))
                for i, (in_whole, part) in group:
                    copied: Any = contextvars.copy_context().run  # jax.config is thread-local
                    make = partial(copied, self._to_host, part, values[i].shape, in_whole)
                    array = await asyncio.get_running_loop().run_in_executor(maker, make)
                    yield i, array, part.local_nbytes
                    del array

    def _to_host(
        self, part: LazyTensor, whole: Shape, in_whole: Callable[[Box], Box]
    ) -> replica_slices.ReplicaSlices:
        """Makes a part; returns what this process writes of it, positioned in the whole array."""
        self.ready()
        array = part.load()
        held = replica_slices.get_replica_slices(
            array,
            self._replica_id,
            self._use_replica_parallel,
            self._min_slice_bytes_for_replica_parallel,
            self._max_replicas_for_replica_parallel,
        )
        with span("to host", part.name, part.local_nbytes):
            for one in held.replica_slices:
                assert isinstance(one.unsliced_data, jax.Array)
                one.unsliced_data.copy_to_host_async()
            on_host = [self._moved(one, part.shape, in_whole) for one in held.replica_slices]
        return replace(held, global_shape=whole, replica_slices=on_host, is_on_host=True)

    def _moved(
        self, held: replica_slices.ReplicaSlice, shape: Shape, in_whole: Callable[[Box], Box]
    ) -> replica_slices.ReplicaSlice:
        """A shard's slice in host memory, positioned in the whole array.

        Sliced on the host: on devices each replica would need a compiled program.
        """
        array = np.asarray(held.unsliced_data)
        if (cut := held.slice_args) is not None:
            within = (slice(None),) * cut.axis
            array = array[(*within, slice(cut.start_index, cut.limit_index))]
        pairs = zip(held.index, shape, strict=True)
        box = in_whole(tuple(s.indices(n)[:2] for s, n in pairs))
        return replica_slices.ReplicaSlice(slices(box), array, None)

    def _write(
        self,
        array: replica_slices.ReplicaSlices,
        info: types_v0.ParamInfo,
        args: types_v0.SaveArgs,
    ) -> Awaitable[Sequence[Any]]:
        return serialize(
            [array],
            [info],
            [args],
            primary_host=self._primary_host,
            metadata_key=self._metadata_key,
            enable_replica_parallel_separate_folder=self._enable_replica_parallel_separate_folder,
            use_replica_parallel=self._use_replica_parallel,
        )


def _groups(
    values: Sequence[LazyTensor], left_out: Container[int]
) -> Sequence[Sequence[tuple[int, Part]]]:
    """The parts of leaves, each with the index of its leaf, in order and grouped."""
    found: dict[object, list[tuple[int, Part]]] = {}
    for i, value in enumerate(values):
        for k, (in_whole, part) in enumerate(value.parts if i not in left_out else ()):
            key = (i, k) if part.group is None else part.group
            found.setdefault(key, []).append((i, (in_whole, part)))
    return [*found.values()]


def _alone() -> Progress:
    """The progress for a save that does not wait for Orbax to begin first."""
    progress = Progress()
    progress.begun.set()
    return progress


class LazyTensorHandler(array_leaf_handler.ArrayLeafHandler):
    """Orbax's leaf handler for `LazyTensor`: saves it as the jax.Array that it becomes.

    `window` bounds the bytes of finished leaves that wait to be written.
    """

    window = 512 << 20
    progress: Progress | None = None
    kept: Mapping[str, Any] = {}
    ready: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *, context: ocp.Context | None = None):
        super().__init__(context=context)
        saving = self._context.array_options.saving
        primary = self._context.multiprocessing_options.primary_host
        self._handler_impl = _LazyArrayHandler(
            primary_host=primary,
            replica_id=None if primary is None else 0,
            use_replica_parallel=saving.use_replica_parallel,
            min_slice_bytes_for_replica_parallel=saving.min_slice_bytes_for_replica_parallel,
            max_replicas_for_replica_parallel=saving.max_replicas_for_replica_parallel,
            enable_replica_parallel_separate_folder=saving.enable_replica_parallel_separate_folder,
            enable_write_sharding_file=saving.enable_write_sharding_file,
            array_metadata_store=saving.array_metadata_store,
        )
        self._handler_impl.window = self.window
        self._handler_impl.progress = self.progress or _alone()
        self._handler_impl.kept = self.kept
        self._handler_impl.ready = self.ready


class _AbstractLazyTensor:
    """The abstract type of LazyTensor, which Orbax requires; nothing is loaded as it."""

    _maxconv_lazy_tensor: bool


def _tree_handler(**own: Any) -> type:
    """Orbax's tree handler with support for lazy leaves; it records itself as the stock one."""
    leaf_handler: Any = type("LazyTensorHandler", (LazyTensorHandler,), own)

    class TreeHandler(pytree_handler.PyTreeHandler):  # type: ignore[misc]
        def __init__(self, **kwargs: Any):
            leaves = leaf_registry.StandardLeafHandlerRegistry()
            leaves.add(
                LazyTensor, _AbstractLazyTensor, leaf_handler, secondary_typestrs=["jax.Array"]
            )
            super().__init__(leaf_handler_registry=leaves, **kwargs)

    stock = pytree_handler.PyTreeHandler
    TreeHandler.__module__, TreeHandler.__qualname__ = stock.__module__, stock.__qualname__
    return TreeHandler


def save(
    directory: str,
    state: TrainState | dict[str, Any],
    window: int,
    progress: Progress,
    ctx: ocp.Context,
    kept: Mapping[str, Any],
    custom_metadata: Mapping[str, Any],
    ready: Callable[[], None],
) -> None:
    """See `maxconv.targets.orbax.save`."""
    ctx.memory.write_concurrent_bytes = window
    handlers = ocp.handlers.local_registry()
    handler = _tree_handler(window=window, progress=progress, kept=kept, ready=staticmethod(ready))
    handlers.add(handler, checkpointable_name="items")
    ctx.checkpointables.registry = handlers
    with ocp.training.Checkpointer(directory, context=ctx) as checkpointer:
        end_together(checkpointer)
        try:
            saving = checkpointer.save_checkpointables_async(
                0,
                {"items": state},
                force=True,
                custom_metadata=dict(custom_metadata),
            )
        finally:
            progress.begun.set()
        assert saving is not None
        saving.result()
    if jax.process_index() == 0:
        journal.clear(directory)
