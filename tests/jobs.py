"""What many tests begin with: a tiny checkpoint, planned."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tiny

from maxconv.algebra import evaluate, tensors
from maxconv.config import parse
from maxconv.jobs.prepare import Job, prepared

MESHES = {
    "fsdp8": ("ici_fsdp_parallelism=8",),
    "fsdp4_tp2": ("ici_fsdp_parallelism=4", "ici_tensor_parallelism=2"),
}
CPU = ("hardware=cpu", "skip_jax_distributed_system=true")


@contextmanager
def tiny_job(
    directory: Path,
    case: str = "llama3.1-8b",
    *words: str,
    scan: bool = True,
    mesh: str = "fsdp4_tp2",
    dtype: str = "bfloat16",
) -> Iterator[Job]:
    """A tiny checkpoint of `case` in `directory`, planned on 8 devices."""
    model = tiny.write(case, directory / "hf", dtype=dtype)
    with prepared(
        parse(job_words(directory, model, tiny.maxtext_words(case, scan), mesh, words))
    ) as job:
        yield job


def job_words(
    directory: Path,
    model: Path,
    words: Sequence[str],
    mesh: str,
    more: Sequence[str] = (),
    key: str = "--hf_model_path",
) -> list[str]:
    """A command line that converts `model`, or what else `key` says, into `directory`/out."""
    return [
        *words,
        *CPU,
        *MESHES[mesh],
        f"{key}={model}",
        f"base_output_directory={directory / 'out'}",
        *more,
    ]


def evaluated(
    directory: Path,
    model: Path,
    words: Sequence[str],
    more: Sequence[str] = (),
    key: str = "--hf_model_path",
) -> dict[str, np.ndarray]:
    """Every leaf of a conversion as its expression says, without compiling anything."""
    with prepared(parse(job_words(directory, model, words, "fsdp8", more, key))) as job:
        found = {leaf.name: leaf.leaf.expr for leaf in job.plan.leaves}
        names = {t.name for expr in found.values() for t in tensors(expr)}
        arrays = {name: job.source.tensor(name) for name in names}
        return {name: evaluate(expr, arrays) for name, expr in found.items()}
