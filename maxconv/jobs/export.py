"""Exports a MaxText checkpoint to Hugging Face: the way back, on the same planner and engine.

Tensors that are read together are made together, in steps of whole chunks: every process is sent
what a step has made of the tensors in its own files, and writes it.
"""

import json
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np

from maxconv.algebra import dims, full
from maxconv.algebra.storage import blocks
from maxconv.execution.engine import Engine
from maxconv.execution.program import Programs
from maxconv.jobs.check_export import check
from maxconv.jobs.export_arrays import Made
from maxconv.jobs.export_record import record
from maxconv.jobs.prepare_export import Export
from maxconv.jobs.reporter import Reporter
from maxconv.planning.placement import local_boxes
from maxconv.planning.plan import Plan
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
    mine = export.plan.of(jax.process_index())
    with liveness.all_or_none(), liveness.unsaved():
        once(lambda: _clear(made))
        writer = Writer(made, export.mine)
        progress = Progress(total=sum(t.nbytes for file in export.mine for t in file.tensors))
        try:
            with (
                Programs(mine.recipes) as programs,
                Engine(mine, export.tree, export.window, programs) as engine,
                reporter.progress("written", lambda: (progress.written, progress.total)),
            ):
                _write(export, mine, engine, writer, progress)
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


def _write(export: Export, plan: Plan, engine: Engine, writer: Writer, progress: Progress) -> None:
    """Makes every slab in turn; while it is written, the next one is made."""
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="write") as pool:
        going: dict[Future[int], int] = {}

        def collect(most: int) -> None:
            while sum(going.values()) > most:
                done, _ = wait(going, return_when=FIRST_COMPLETED)
                for future in done:
                    del going[future]
                    progress.written += future.result()

        for group in plan.groups:
            arrays = engine.make_slabs([slab for _, slab in group])
            for (planned, slab), array in zip(group, arrays, strict=True):
                made = export.made[planned.name]
                nbytes = slab.local_nbytes
                collect(max(0, export.window // 4 - nbytes))
                going[pool.submit(_written, made, slab, array, writer)] = nbytes
            del arrays
        collect(0)


def _copy(export: Export, writer: Writer, progress: Progress) -> None:
    """Copies the published tensors of this process that the checkpoint has nothing for."""
    for name in filter(writer.has, export.back.copied):
        info = export.published.tensors[export.back.origins[name]]
        for box in blocks(full(info.shape), info.dtype.itemsize, _BLOCK):
            data = np.empty(dims(box), info.dtype)
            export.published.read(info, [(box, data)])
            progress.written += writer.write(name, box, data)


def _written(made: Made, slab: Slab, array: jax.Array, writer: Writer) -> int:
    """Writes what is in a slab of the tensors of this process; returns the bytes."""
    total = 0
    boxes = local_boxes(slab.sharding, slab.shape)
    distinct = {boxes[shard.device]: shard.data for shard in array.addressable_shards}
    for box, shard in distinct.items():
        data = np.asarray(shard)
        for name, within, part in made.parts(slab.in_leaf(box)):
            if writer.has(name):
                total += writer.write(name, part, data[within])
    return total
