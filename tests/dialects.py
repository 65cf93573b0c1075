"""A tiny checkpoint that a test changes into what other programs leave, and what becomes of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tiny
from jobs import job_words
from plans import make_leaf
from safetensors.numpy import load_file, save_file

from maxconv.config import Config, parse
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.jobs.prepare import prepared

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
BF16 = np.dtype(ml_dtypes.bfloat16)
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Checkpoint:
    """A tiny model of a family, whose tensors and config.json a test changes."""

    def __init__(self, case: str | tiny.Case, directory: Path):
        self.case, self.directory = tiny.CASES[case] if isinstance(case, str) else case, directory
        self.hf = tiny.write(self.case, directory / "hf", shard_bytes=None)
        self.tensors = load_file(self.hf / "model.safetensors")

    def entries(self, **entries: Any) -> None:
        """Entries of config.json; None takes one out."""
        path = self.hf / "config.json"
        config = json.loads(path.read_text()) | entries
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    def save(self, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        kept = {n: np.ascontiguousarray(x) for n, x in (tensors or self.tensors).items()}
        save_file(kept, self.hf / "model.safetensors")

    def config(self, *more: str) -> Config:
        """That of a command line that converts it."""
        words = [*tiny.maxtext_words(self.case, self.case.scans)]
        return parse(job_words(self.directory, self.hf, words, "fsdp8", more))

    def converted(self, *more: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        """Every leaf as it is made on devices, and what the user is told."""
        with (
            prepared(self.config(*more)) as job,
            Engine(job.plan, job.source, window=1 << 20) as engine,
        ):
            made = {leaf.name: np.asarray(make_leaf(engine, leaf)) for leaf in job.plan.leaves}
            return made, job.notices

    def refused(self, *more: str) -> str:
        with pytest.raises(UserError) as caught:
            self.converted(*more)
        return "\n".join(caught.value.problems)


def same(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    differ = [n for n in theirs if not np.array_equal(ours[n], theirs[n])]
    assert not differ
