"""Compares exported files with what they should be: their layout, and every tensor.

Tensors are compared with what numpy makes of the checkpoint. That uses neither the planner nor the
engine, nor the stacks in which tensors are made: each tensor is evaluated by itself, from what
TensorStore reads, and compared with what the safetensors library reads.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from etils import epath

from maxconv.algebra import Box, Expr, Tensor, full, tensors
from maxconv.errors import UserError, VerificationError
from maxconv.jobs.export_files import file_problems
from maxconv.jobs.reporter import Reporter
from maxconv.jobs.witness import (
    SAMPLE_BYTES,
    box_in,
    difference,
    evaluated,
    has_sums,
    pieces,
    plainly_read,
)
from maxconv.processes import liveness
from maxconv.processes.agreement import gathered
from maxconv.sources import Source
from maxconv.targets.repository import is_repository

if TYPE_CHECKING:
    from maxconv.jobs.prepare_export import Export

_MOST_PROBLEMS = 10


def check(export: "Export", reporter: Reporter) -> None:
    """Reads files back, as many as `export.config.verify` says; each process an equal part.

    Raises:
        VerificationError: a file or a tensor differs.
    """
    started = time.monotonic()
    with liveness.all_or_none():
        damaged = _damaged(export)
        problems, count, nbytes = list[str](), 0, 0
        try:
            with export.target.opened() as written:
                names = [tensor.name for file in export.files for tensor in file.tensors]
                if damaged:  # what can still be read of the others
                    files = {name: stored.file for name, stored in written.stored.items()}
                    names = [n for n in names if n in files and files[n] not in damaged]
                for name, boxes in _share(export, names):
                    problem, compared = _compared(export, written, name, boxes)
                    problems += [problem] if problem else []
                    count, nbytes = count + 1, nbytes + compared
        except UserError as error:
            problems += () if damaged else error.problems
        told = gathered([count, nbytes, problems[:_MOST_PROBLEMS]])
    every = [*damaged.values(), *(problem for _, _, found in told for problem in found)]
    if every:
        raise VerificationError(export.target.place, [*dict.fromkeys(every)])
    done, total = (sum(said[i] for said in told) for i in range(2))
    of = len(export.back.rules) + len(export.back.copied)
    reporter.compared(done, of, total, time.monotonic() - started)


def _damaged(export: "Export") -> dict[str, str]:
    """A sentence for each file that is not as it was written, whatever is in its tensors."""
    found: dict[str, str] = {}
    place = export.target.place
    if jax.process_index() == 0 and not is_repository(place):  # a commit has all or nothing
        tensors = (tensor for file in export.files for tensor in file.tensors)
        found = file_problems(epath.Path(place), tensors, export.others)
    return gathered(found)[0]


def _compared(
    export: "Export", written: Source, name: str, boxes: Sequence[Box]
) -> tuple[str | None, int]:
    """A sentence if a tensor differs, and the bytes that were compared."""
    expr, info, nbytes = _expression(export, name), written.tensors[name], 0
    for box in boxes:
        if name in export.back.rules:
            made = evaluated(expr, box, export.tree.tensors, export.tree.plain)
        else:
            made = plainly_read(export.published, export.copied(name), box)
        with np.errstate(all="ignore"):
            made = made.astype(info.dtype)
        found = plainly_read(written, info, box)
        if problem := difference(name, box, made, found, has_sums(expr)):
            return problem, nbytes
        nbytes += found.nbytes
    return None, nbytes


def _expression(export: "Export", name: str) -> Expr:
    """How a tensor is made; one that was copied is just itself."""
    return export.back.rules.get(name) or Tensor(name, export.copied(name).shape)


def _share(export: "Export", names: Sequence[str]) -> Iterator[tuple[str, list[Box]]]:
    """Of tensors those that this process compares, each with the boxes of it."""
    is_full = export.config.verify == "full"
    if not is_full:  # one of each stack comes first
        firsts = {stack.names[0] for stack in export.stacks.values()}
        names = sorted(names, key=lambda name: (name not in firsts, zlib.crc32(name.encode())))
    left = SAMPLE_BYTES
    for name in names[jax.process_index() :: jax.process_count()]:
        expr = _expression(export, name)
        if is_full:
            yield name, [*pieces(expr, full(expr.shape), 4)]
            continue
        box = box_in(full(expr.shape), 4, np.random.default_rng(zlib.crc32(name.encode())), False)
        sources = {tensor.name for tensor in tensors(expr)} & export.tree.tensors.keys()
        left -= sum(export.tree.tensors[leaf].chunk_nbytes for leaf in sources)
        if left < 0:
            return
        yield name, [box]
