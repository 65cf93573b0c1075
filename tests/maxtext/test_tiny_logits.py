"""Tiny models through maxconv and MaxText: the logits are those of transformers.

Runs in the environment that `environment.sh` makes, with maxconv installed in it. The reference is
stored by `reference_tiny.py`. In both float32.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import load_logits  # noqa: E402
import tiny  # noqa: E402
from test_smollm2 import run  # noqa: E402

# What a run of MaxText must be told beside the sizes, and how much its logits may differ.
CASES: dict[str, tuple[list[str], float]] = {
    # Its logits are computed with the embedding table rounded to bfloat16.
    "gemma3-4b+64": ([], 3e-3),
}


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unscan"])
@pytest.mark.parametrize("case", CASES)
def test_maxtext_says_what_transformers_says(case: str, scan: bool, tmp_path: Path) -> None:
    run_words, tolerance = CASES[case]
    words = [*tiny.maxtext_words(case, scan), *run_words]
    checkpoint = tiny.write(case, tmp_path / "hf", "float32")
    run(
        *("-m", "maxconv.to_maxtext", *words, "hardware=cpu", "skip_jax_distributed_system=True"),
        *(f"--hf_model_path={checkpoint}", f"base_output_directory={tmp_path / 'out'}"),
        *("--save_dtype=float32", f"--simulated_cpu_devices_count={load_logits.DEVICES}"),
    )
    stored, out = HERE.parent / "data" / "logits" / f"{case}.npz", tmp_path / "logits.npy"
    run(
        *(HERE / "load_logits.py", tmp_path / "out/0/items", *words, "--tokens", stored),
        *("--loader", "pretrain", "--scan" if scan else "--no-scan", "--out", out),
    )
    reference = np.load(stored)["logits"]
    difference = abs(np.load(out) - reference).max() / abs(reference).max()
    assert difference <= tolerance, f"the logits of {case} differ by {difference} of the largest"
