"""What MaxText wrote, as `maxtext/record.py` stored it, beside what maxconv makes of it.

    python recorded.py [TEXT ...]

prints the table of results: of all runs, or of those whose names hold one of the texts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":  # before jax looks
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }

import tiny
from jobs import job_words
from plans import make_leaf

from maxconv.algebra import evaluate
from maxconv.config import parse
from maxconv.execution.engine import Engine
from maxconv.jobs.prepare import Job, prepared

RECORDED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data/maxtext_leaves.json").read_text()
)


def by_engine(job: Job) -> dict[str, Any]:
    """Every leaf as a conversion makes it: by compiled programs, on the devices."""
    with Engine(job.plan, job.source, window=1 << 20) as engine:
        leaves = {leaf.name: make_leaf(engine, leaf) for leaf in job.plan.leaves}
        assert engine.programs.compiled == job.plan.programs
    return leaves


def by_numpy(job: Job) -> dict[str, Any]:
    """Every leaf as its expression says."""
    needed = {name for leaf in job.plan.leaves for name in leaf.leaf.tensors}
    arrays = {name: job.source.tensor(name) for name in needed}
    return {
        leaf.name: evaluate(leaf.leaf.expr, arrays).astype(leaf.dtype) for leaf in job.plan.leaves
    }


def compare(
    name: str, directory: Path, made_by: Callable[[Job], dict[str, Any]] = by_engine
) -> tuple[str, list[str]]:
    """The architecture of a recorded run, and the leaves that maxconv makes otherwise, or not."""
    recorded = RECORDED[name]
    case, key, dtype = recorded["case"], "--hf_model_path", recorded["source_dtype"]
    if adapter := recorded.get("adapter"):
        key = "hf_lora_adapter_path"
        model = tiny.write_adapter(case, adapter, directory / "hf", dtype)
    else:
        model = tiny.write(case, directory / "hf", dtype)
    mesh = "fsdp8" if " scan" in name else "fsdp4_tp2"
    words = [*recorded["words"], f"--save_dtype={recorded['save_dtype']}"]
    with prepared(parse(job_words(directory, model, words, mesh, key=key))) as job:
        ours = made_by(job)
        architecture = job.model.family.architectures[0]
    theirs = {_ours_of(n): leaf for n, leaf in recorded["leaves"].items() if n != "step"}
    both = ours.keys() & theirs.keys()
    made = {n: _described(_as_recorded(ours[n], theirs[n]["dtype"])) for n in both}
    different = [n for n in both if made[n] != theirs[n]]
    return architecture, sorted({*different, *(ours.keys() ^ theirs.keys())})


def _ours_of(name: str) -> str:
    """The name of a leaf of MaxText's: what it keeps beside params, maxconv has below them."""
    return re.sub(r"^params\.(MoEBiasVar|Tid2EidVar)\.", "params.params.", name)


def _as_recorded(leaf: Any, dtype: str) -> np.ndarray:
    """A leaf's values; numbers of experts are integers here, which MaxText's converter rounds."""
    array = np.asarray(leaf)
    return array.astype(dtype) if array.dtype.kind == "i" else array


def _described(array: np.ndarray) -> dict[str, Any]:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": digest}


def main(texts: list[str]) -> int:
    status, repairs = 0, dict[str, int]()
    head = ("architecture", "run", "leaves", "identical", "MaxText")
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for name, recorded in RECORDED.items():
        if texts and not any(text in name for text in texts):
            continue
        with tempfile.TemporaryDirectory() as directory:
            architecture, different = compare(name, Path(directory))
        repair = recorded.get("repaired")
        how = f"repaired: {repairs.setdefault(repair, len(repairs) + 1)}" if repair else "as it is"
        identical = f"no: {', '.join(different)}" if different else "yes"
        cells = (architecture, name, str(len(recorded["leaves"]) - 1), identical, how)
        print(f"| {' | '.join(cells)} |", flush=True)
        status |= bool(different)
    for repair, number in repairs.items():
        print(f"\n{number}. {repair}.")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
