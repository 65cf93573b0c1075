"""What transformers makes of a checkpoint converts to the same leaves as its files.

Runs where torch and transformers are installed: `pip install '.[transformers]'`.
"""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny  # noqa: E402
from jobs import job_words  # noqa: E402
from plans import make_leaf

from maxconv.config import parse  # noqa: E402
from maxconv.execution.engine import Engine  # noqa: E402
from maxconv.jobs.prepare import prepared  # noqa: E402

EAGER = ("--lazy_load_tensors=False", "--eager_load_method=transformers")


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen3-0.6b", "gemma3-4b+vision"])
def test_leaves_are_those_of_the_files(case, tmp_path):
    model = tiny.write(case, tmp_path / "hf")
    theirs, ours = (leaves(tmp_path, case, model, more) for more in ((), EAGER))
    assert ours.keys() == theirs.keys()
    for name, leaf in theirs.items():
        assert ours[name].tobytes() == leaf.tobytes(), name


def leaves(directory, case, model, more):
    words = job_words(directory, model, tiny.maxtext_words(case, True), "fsdp8", more)
    with prepared(parse(words)) as job, Engine(job.plan, job.source, window=1 << 20) as engine:
        return {leaf.name: np.asarray(make_leaf(engine, leaf)) for leaf in job.plan.leaves}
