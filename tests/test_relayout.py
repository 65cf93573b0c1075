"""A checkpoint in another layout, as whole jobs: against the conversion in that layout.

Checkpoints are restored by Orbax, and compared with numpy.
"""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
import tiny
from etils import epath
from jobs import CPU, MESHES
from test_export import bytes_read, converted

from maxconv import cli
from maxconv.config import parse
from maxconv.execution.engine import Engine
from maxconv.jobs import convert, prepare_relayout
from maxconv.jobs.prepare import Job
from maxconv.sources.trees import TreeSource

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info")

Leaves = dict[str, np.ndarray]


def restored(directory: Path) -> Leaves:
    """Every array of a checkpoint, as Orbax restores it, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree(directory))
    }


def tree(directory: Path) -> Any:
    """A checkpoint, as Orbax restores it."""
    items = epath.Path(directory / "0/items")
    handler = ocp_v0.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(
        lambda _: ocp_v0.RestoreArgs(restore_type=np.ndarray), handler.metadata(items).tree
    )
    args = ocp_v0.args.PyTreeRestore(restore_args=as_numpy)
    return ocp_v0.Checkpointer(handler).restore(items, args=args)


def assert_same(got: Leaves, want: Leaves) -> None:
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name


def relayout(checkpoint: Path, to: Path, *words: str) -> Job:
    """Runs the job on eight devices."""
    given = [*CPU, f"base_output_directory={to}", "--verify=none", *words]
    return convert.run(
        parse(given), None, partial(prepare_relayout.prepared, checkpoint=str(checkpoint))
    )


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
    job = relayout(stacked, there, *words, *MESHES["fsdp8"])
    assert_same(restored(there), wanted["apart"])
    assert job.source.stats.bytes_read == stored_nbytes(stacked)

    back = tmp_path / "back"
    words = tiny.maxtext_words(case, True)
    job = relayout(there, back, *words, *MESHES["fsdp4_tp2"])
    assert_same(restored(back), wanted["stacked"])
    assert job.source.stats.bytes_read == stored_nbytes(apart)


def nested(leaves: Leaves) -> dict[str, Any]:
    """Leaves by their path in MaxText's tree, as a tree."""
    found: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.removeprefix("params.params.").split(".")
        node = found
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return found


def state(weights: Leaves, rngs: dict[str, Any], optimizer: str = "adamw") -> dict[str, Any]:
    """As MaxText's trainer saves it: optax' states as a list, and what is no weight in nnx_aux."""

    def of_each(factor: float) -> dict[str, Any]:
        moments = {n: np.asarray(np.float32(x) * factor, "f4") for n, x in weights.items()}
        return {"params": nested(moments)}

    adam = {"count": np.int32(2), "mu": of_each(1.7), "nu": of_each(0.3)}
    rng = {"key": np.arange(4, dtype=np.uint32), "count": np.uint32(9)}
    states = {"adamw": [adam, None, {"count": np.int32(2)}, None], "adam": [adam]}
    return {
        "params": {"params": nested(weights)},
        "opt_state": states[optimizer],
        "step": np.int32(2),
        "nnx_aux": {"model": {"decoder": {"rngs": rng, **rngs}}},
    }


def save(tree: Any, directory: Path, form: bool = True) -> Path:
    """Saves a tree with Orbax, as a step of a run."""
    handler = ocp_v0.PyTreeCheckpointHandler(use_ocdbt=form, use_zarr3=form)
    ocp_v0.Checkpointer(handler).save(directory / "0/items", args=ocp_v0.args.PyTreeSave(tree))
    return directory


def layers_of(count: int, axis: int, leaves: Leaves) -> Leaves:
    """The layers of stacks, one by one."""
    found: Leaves = {}
    for name, leaf in leaves.items():
        if "decoder.layers." not in name:
            found[name] = leaf
            continue
        for i in range(count):
            found[name.replace("decoder.layers", f"decoder.layers_{i}")] = leaf.take(i, axis)
    return found


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("adam", marks=pytest.mark.slow)])
def test_a_training_state(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = converted("llama3.1-8b", True, tmp_path / "out")
    whole = restored(out)
    weights = {name: whole[name].astype(np.float32) * np.float32(1.1) for name in whole}
    del weights["step"]
    count = tiny.CASES["llama3.1-8b"].config["num_hidden_layers"]
    rngs = {"layers": {"rngs": {"key": np.arange(4 * count, dtype=np.uint32).reshape(count, 4)}}}
    run = save(state(weights, rngs, optimizer), tmp_path / "run")
    given = [f"--hf_model_path={model}", "--train_state"]

    job = relayout(run, tmp_path / "apart", "scan_layers=false", *given)
    each = {
        f"layers_{i}": {"rngs": {"key": rngs["layers"]["rngs"]["key"][i]}} for i in range(count)
    }
    wanted = state(layers_of(count, 1, weights), each, optimizer)
    got = tree(tmp_path / "apart")
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    jax.tree.map(lambda x, y: assert_same({"": np.asarray(x)}, {"": np.asarray(y)}), got, wanted)
    assert job.source.stats.bytes_read == sum(x.nbytes for x in jax.tree.leaves(wanted))
    assert not [notice for notice in job.notices if "left out" in notice]
    assert cli.main(["verify", str(tmp_path / "apart")]) == 0

    relayout(tmp_path / "apart", tmp_path / "back", "scan_layers=true", *given)
    assert_same(restored(tmp_path / "back"), restored(run))


@pytest.mark.parametrize(
    ("case", "scan"),
    [
        ("llama3.1-8b", True),
        pytest.param("llama3.1-8b", False, marks=pytest.mark.slow),
        pytest.param("gemma3-4b", True, marks=pytest.mark.slow),
        pytest.param("mixtral-8x7b", True, marks=pytest.mark.slow),
        pytest.param("mixtral-8x7b", False, marks=pytest.mark.slow),
    ],
)
def test_in_slabs_and_steps(
    case: str, scan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks are larger than a step, and yet TensorStore reads each once."""
    model, out = converted(case, scan, tmp_path / "out")
    given = [f"--hf_model_path={model}", *tiny.maxtext_words(case, not scan), *MESHES["fsdp8"]]
    relayout(out, tmp_path / "whole", *given)
    monkeypatch.setattr(prepare_relayout, "window_of", lambda config: 1 << 17)
    config, stored = parse([*given, *CPU, f"base_output_directory={tmp_path}"]), stored_nbytes(out)
    with prepare_relayout.prepared(config, str(out), writes=False) as job:
        before = bytes_read()
        with Engine(job.plan, job.source, job.window) as engine:
            for group in job.plan.groups:
                engine.make_slabs([slab for _, slab in group])
        assert bytes_read() - before < 1.1 * stored  # small ones are there with the index
    job = relayout(out, tmp_path / "parts", *given)
    assert job.source.stats.bytes_read == stored
    assert len(job.plan.steps) > len(job.source.tensors)
    assert max(len(leaf.slabs) for leaf in job.plan.leaves) > 1
    assert_same(restored(tmp_path / "parts"), restored(tmp_path / "whole"))


def test_what_is_kept_is_what_calls_share(tmp_path: Path) -> None:
    _, out = converted("llama3.1-8b", True, tmp_path)
    with TreeSource(str(out)) as tree:
        name, other = "decoder.layers.mlp.wi_0.kernel", "decoder.logits_dense.kernel"
        info, beside = tree.tensors[name], tree.tensors[other]
        assert info.chunk == (42, 3, 26) and info.shape == (42, 3, 52)
        rows = [(name, [((i, i + 21), (0, 3), (0, 52))]) for i in (0, 21)]
        columns = [(name, [((0, 42), (0, 3), (i, i + 26))]) for i in (0, 26)]
        assert tree.shared(columns) == 0  # each chunk is read by one call
        assert tree.shared(rows) == info.nbytes  # both by each
        whole = (other, [((0, 42), (0, 259))])
        assert tree.shared([whole, *rows, *columns[:1]]) == info.nbytes
        assert tree.shared([rows[0], whole, rows[1]]) == info.nbytes + beside.nbytes
