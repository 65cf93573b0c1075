"""Exports a MaxText checkpoint to Hugging Face: the way back, on the same planner and engine.

Tensors that are read together are made together, in steps of whole chunks: every process holds what
a step has made, and writes the parts of the tensors that are in its own files.
"""

import json
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np

from maxconv.algebra import Box, dims, full
from maxconv.algebra.storage import blocks
from maxconv.algebra.together import Stack
from maxconv.execution.engine import Engine
from maxconv.execution.program import Programs
from maxconv.jobs.check_export import check
from maxconv.jobs.export_record import record
from maxconv.jobs.prepare_export import Export
from maxconv.jobs.reporter import Reporter
from maxconv.planning.placement import local_boxes
from maxconv.planning.slabs import Slab
from maxconv.processes import liveness
from maxconv.processes.agreement import once, wait_for_all
from maxconv.targets import place, shards
from maxconv.targets.base import Progress
from maxconv.targets.shards import Writer

PATIENCE = 24 * 3600  # seconds for the other processes to finish writing
_BLOCK = 16 << 20  # bytes of a tensor that are copied at once
_WRITERS = 4  # threads that copy to files


def run(export: Export, reporter: Reporter) -> None:
    """Makes and writes every tensor, and verifies them as configured.

    Raises:
        VerificationError: a file differs from what numpy makes of the checkpoint.
    """
    started = time.monotonic()
    for notice in export.notices:
        reporter.note(notice)
    made = export.directory / shards.UNFINISHED
    with liveness.all_or_none(), liveness.unsaved():
        once(lambda: _clear(made))
        writer = Writer(made, export.mine)
        progress = Progress(total=sum(t.nbytes for file in export.mine for t in file.tensors))
        try:
            with (
                Programs(export.plan.recipes) as programs,
                Engine(export.plan, export.tree, export.window, programs) as engine,
                reporter.progress("written", lambda: (progress.written, progress.total)),
            ):
                _write(export, engine, writer, progress)
                _copy(export, writer, progress)
                writer.finish()
        finally:
            writer.close()
        wait_for_all("written", PATIENCE)
        made_of = record(export.config.words, export.tree.root)
        others = {**export.others, place.WORDS: (json.dumps(made_of, indent=2) + "\n").encode()}
        once(lambda: shards.commit(export.directory, export.files, others))
        liveness.saved()
    tensors = [tensor for file in export.files for tensor in file.tensors]
    nbytes, seconds = sum(tensor.nbytes for tensor in tensors), time.monotonic() - started
    reporter.exported(str(export.directory), len(tensors), len(export.files), nbytes, seconds)
    if export.config.verify != "none":
        check(export, reporter)


def _clear(directory: Path) -> None:
    if directory.exists():
        for path in directory.iterdir():
            path.unlink()
    directory.mkdir(parents=True, exist_ok=True)


def _write(export: Export, engine: Engine, writer: Writer, progress: Progress) -> None:
    """Makes every slab in turn; while it is written, the next one is made."""
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        going: dict[Future[int], int] = {}

        def collect(most: int) -> None:
            while sum(going.values()) > most:
                done, _ = wait(going, return_when=FIRST_COMPLETED)
                for future in done:
                    del going[future]
                    progress.written += future.result()

        for group in export.plan.groups:
            arrays = engine.make_slabs([slab for _, slab in group])
            for (planned, slab), array in zip(group, arrays, strict=True):
                stack = export.stacks[planned.name]
                nbytes = slab.local_nbytes
                collect(max(0, export.window // 4 - nbytes))
                going[pool.submit(_written, stack, slab, array, writer)] = nbytes
            del arrays
        collect(0)


def _copy(export: Export, writer: Writer, progress: Progress) -> None:
    """Copies the published tensors of this process that the checkpoint has nothing for."""
    for name in filter(writer.has, export.back.copied):
        info = export.published.tensors[name]
        for box in blocks(full(info.shape), info.dtype.itemsize, _BLOCK):
            data = np.empty(dims(box), info.dtype)
            export.published.read(info, [(box, data)])
            progress.written += writer.write(name, box, data)


def _written(stack: Stack, slab: Slab, array: jax.Array, writer: Writer) -> int:
    """Writes what is in a slab of the tensors of this process; returns the bytes."""
    total = 0
    boxes = local_boxes(slab.sharding, slab.shape)
    distinct = {boxes[shard.device]: shard.data for shard in array.addressable_shards}
    for box, shard in distinct.items():
        data = np.asarray(shard)
        for name, within, part in _parts(stack, slab.in_leaf(box)):
            if writer.has(name):
                total += writer.write(name, part, data[within])
    return total


def _parts(stack: Stack, box: Box) -> Iterator[tuple[str, tuple[int, ...], Box]]:
    """For a box of a stack: each tensor in it, its place in the box, and the box of the tensor."""
    lanes, part = box[: len(stack.leading)], box[len(stack.leading) :]
    for within in np.ndindex(*dims(lanes)):
        place = tuple(lo + i for (lo, _), i in zip(lanes, within, strict=True))
        number = int(np.ravel_multi_index(place, stack.leading)) if place else 0
        yield stack.names[number], within, part
