"""Compares exported files with what numpy makes of the checkpoint, tensor by tensor.

It uses neither the planner nor the engine, nor the stacks in which tensors are made: each tensor is
evaluated by itself, from what TensorStore reads, and compared with what the safetensors library
reads.
"""

import time
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

from maxconv.algebra import Box, full, tensors
from maxconv.errors import VerificationError
from maxconv.jobs.reporter import Reporter
from maxconv.jobs.witness import (
    SAMPLE_BYTES,
    box_in,
    difference,
    evaluated,
    pieces,
    plainly_read,
)
from maxconv.processes import liveness
from maxconv.processes.agreement import gathered

if TYPE_CHECKING:
    from maxconv.jobs.prepare_export import Export

_MOST_PROBLEMS = 10


def check(export: "Export", reporter: Reporter) -> None:
    """Reads files back, as many as `export.config.verify` says; each process an equal part.

    Raises:
        VerificationError: a tensor differs.
    """
    started = time.monotonic()
    problems: list[str] = []
    count = nbytes = 0
    with liveness.all_or_none(), export.target.opened() as written:
        for name, boxes in _share(export):
            expr, info = export.back.rules[name], written.tensors[name]
            for box in boxes:
                made = evaluated(expr, box, export.tree.tensors, export.tree.plain)
                with np.errstate(all="ignore"):
                    made = made.astype(info.dtype)
                found = plainly_read(written, info, box)
                if problem := difference(name, box, made, found):
                    problems.append(problem)
                    break
                nbytes += found.nbytes
            count += 1
        told = gathered([count, nbytes, problems[:_MOST_PROBLEMS]])
    if every := [problem for _, _, found in told for problem in found]:
        raise VerificationError(export.target.place, every)
    done, total = (sum(said[i] for said in told) for i in range(2))
    reporter.compared(done, len(export.back.rules), total, time.monotonic() - started)


def _share(export: "Export") -> Iterator[tuple[str, list[Box]]]:
    """The tensors that this process compares, each with the boxes of it."""
    is_full = export.config.verify == "full"
    names = [name for stack in export.stacks.values() for name in stack.names]
    if not is_full:  # one of each stack comes first
        firsts = [stack.names[0] for stack in export.stacks.values()]
        names = [*firsts, *sorted(set(names) - set(firsts), key=lambda n: zlib.crc32(n.encode()))]
    left = SAMPLE_BYTES
    for name in names[jax.process_index() :: jax.process_count()]:
        expr = export.back.rules[name]
        if is_full:
            yield name, [*pieces(expr, full(expr.shape), 4)]
            continue
        leaves = {tensor.name for tensor in tensors(expr)}
        left -= sum(export.tree.tensors[leaf].chunk_nbytes for leaf in leaves)
        if left < 0:
            return
        random = np.random.default_rng(zlib.crc32(name.encode()))
        yield name, [box_in(full(expr.shape), 4, random, False)]
