"""A checkpoint in another layout, as whole jobs: against the conversion in that layout.

Checkpoints are restored by Orbax, and compared with numpy.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
import tiny
from jobs import CPU, MESHES
from test_export import converted

from maxconv.config import parse
from maxconv.jobs import convert
from maxconv.jobs.prepare import Job
from maxconv.jobs.prepare_relayout import prepared

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info")

Leaves = dict[str, np.ndarray]


def restored(directory: Path) -> Leaves:
    """Every array of a checkpoint, as Orbax restores it, by its path."""
    items = directory / "0/items" if (directory / "0/items").exists() else directory
    handler = ocp_v0.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(
        lambda _: ocp_v0.RestoreArgs(restore_type=np.ndarray), handler.metadata(items).tree
    )
    args = ocp_v0.args.PyTreeRestore(restore_args=as_numpy)
    tree = ocp_v0.Checkpointer(handler).restore(items, args=args)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_same(got: Leaves, want: Leaves) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name


def relayout(checkpoint: Path, to: Path, *words: str) -> Job:
    """Runs the job on eight devices, and checks every bit of the result in its own way, too."""
    given = [*CPU, f"base_output_directory={to}", "--verify=full", *words]
    return convert.run(parse(given), None, partial(prepared, checkpoint=str(checkpoint)))


def stored_nbytes(directory: Path) -> int:
    """Bytes of the weights of a checkpoint."""
    arrays = restored(directory).items()
    return sum(array.nbytes for name, array in arrays if name.startswith("params."))


HARD = [
    "deepseek3-671b",
    "gemma3-4b+vision",
    "gemma4-26b+vision",
    "qwen3-next-80b-a3b",
    "qwen3.5-35b-a3b-fp8",
]


@pytest.mark.parametrize(
    "case",
    ["llama3.1-8b", *(pytest.param(c, marks=pytest.mark.slow) for c in HARD)],
)
def test_there_and_back(case: str, tmp_path: Path) -> None:
    """Each byte that is stored is read once, and becomes what a conversion makes of it."""
    model, stacked = converted(case, True, tmp_path / "stacked")
    apart = converted(case, False, tmp_path / "apart", f"--hf_model_path={model}")[1]
    wanted = {"stacked": restored(stacked), "apart": restored(apart)}

    there = tmp_path / "there"
    words = tiny.maxtext_words(case, False)
    job = relayout(stacked, there, *words, *MESHES["fsdp8"], "--verify=none")
    assert_same(restored(there), wanted["apart"])
    assert job.source.stats.bytes_read == stored_nbytes(stacked)

    back = tmp_path / "back"
    words = tiny.maxtext_words(case, True)
    job = relayout(there, back, *words, *MESHES["fsdp4_tp2"], "--verify=none")
    assert_same(restored(back), wanted["stacked"])
    assert job.source.stats.bytes_read == stored_nbytes(apart)
