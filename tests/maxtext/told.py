"""Tiny checkpoints whose config.json says more than sizes: what the logits are made with.

Whoever computes the reference and whoever converts write the same config.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny  # noqa: E402

YARN = {
    "rope_type": "yarn",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 8192,
    "attention_factor": 1.2079441541679836,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # short, so that it matters to a short sequence
}
SAID: dict[str, dict[str, Any]] = {
    # As published; but five experts make one group.
    "deepseek3-671b": {
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 163840,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    # MaxText scales the positions of all layers, transformers 5 not those of sliding attention.
    "olmo3-7b": {
        "max_position_embeddings": 65536,
        "rope_scaling": None,
        "rope_parameters": {"sliding_attention": YARN, "full_attention": YARN},
    },
    "llama3.1-8b,plain": {"rope_scaling": None, "rope_theta": 10000.0, "rms_norm_eps": 1e-2},
    "llama3.1-8b,factor": {"rope_scaling": LLAMA3, "rope_theta": 10000.0},
    "llama2-7b,linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral-7b,theta": {"rope_theta": 1e6, "sliding_window": None},
}


def write(name: str, directory: str | Path, dtype: str) -> Path:
    """Writes a case (its name may go on after a comma) as a checkpoint; returns its directory."""
    path = tiny.write(name.partition(",")[0], directory, dtype)
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | SAID.get(name, {})))
    return path
