"""A checkpoint in another layout, as whole jobs: against the conversion in that layout.

Checkpoints are restored by Orbax, and compared with numpy.
"""

import json
import re
import shutil
from collections.abc import Callable
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
from test_export import BF16, bytes_read, converted

import maxconv
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


def test_what_is_kept_is_what_calls_share(plain: tuple[Path, Path]) -> None:
    _, out = plain
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


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of Hugging Face, and its conversion with stacked layers."""
    return converted("llama3.1-8b", True, tmp_path_factory.mktemp("plain"))


def files(directory: Path) -> dict[str, bytes]:
    """What is in a directory, and not behind its links."""
    return {str(p): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said of a command line that cannot be right: one sentence."""
    capsys.readouterr()
    assert cli.main(["relayout", *words, *CPU, *MESHES["fsdp8"]]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if not x.startswith("note: "))
    return line.removeprefix("maxconv: ")


@pytest.mark.parametrize(
    "target",
    [
        *("{link}/", "{to_step}", "{out}/0/items"),
        *(
            pytest.param(to, marks=pytest.mark.slow)
            for to in ("{out}", "{out}/", "{out}/../out", "{out}/0")
        ),
    ],
)
def test_the_checkpoint_itself_is_never_replaced(
    target: str, plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made = plain
    out, link, to_step = (tmp_path / name for name in ("out", "link", "to_step"))
    shutil.copytree(made, out)
    link.symlink_to(out)
    to_step.mkdir()
    (to_step / "0").symlink_to(out / "0")
    before = files(tmp_path)
    to = target.format(out=out, link=link, to_step=to_step)
    for given in ([str(out)], [str(link)], [f"{out}/0/items"], [f"{to_step}"]):
        words = [f"base_output_directory={to}", "scan_layers=false", f"--hf_model_path={model}"]
        line = refused(capsys, *given, *words, "--overwrite")
        assert "which is read, or lie in it; name another directory." in line
    assert files(tmp_path) == before


def adapter(weights: Leaves) -> Leaves:
    shapes = {"kernel_lora_a": (42, 3, 4), "kernel_lora_b": (4, 3, 6, 10)}
    factors = {
        f"params.params.decoder.layers.self_attention.query.{name}": np.ones(shape, np.float32)
        for name, shape in shapes.items()
    }
    return weights | factors


def of_no_table(weights: Leaves) -> Leaves:
    return weights | {"params.params.decoder.layers.mlp.more": np.ones((42, 3), np.float32)}


def cut(weights: Leaves) -> Leaves:
    name = "params.params.decoder.layers.mlp.wo.kernel"
    return weights | {name: weights[name][:-1]}


def without(weights: Leaves) -> Leaves:
    return {name: leaf for name, leaf in weights.items() if "mlp.wo" not in name}


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (adapter, [], "has a LoRA adapter, which is not laid out anew; convert the adapter again"),
        (of_no_table, [], "has 'decoder.layers.mlp.more', which this model has not."),
        (cut, [], "has 51 where .*hf has 52: in 'decoder.layers.mlp.wo.kernel'."),
        (without, [], "lacks 'decoder.layers.mlp.wo.kernel'."),
        (None, ["base_num_decoder_layers=4"], "=4, but .* has 3; ask for fewer."),
        (None, ["--train_state"], "has no state of an optimizer; remove --train_state."),
        (None, ["--step=3"], "is not step 3 of a checkpoint"),
        (dict, ["--hf_model_path="], "Name the model at Hugging Face"),
        (None, ["base_output_directory="], "base_output_directory"),
    ],
)
def test_bad_input_is_named(
    change: Callable[[Leaves], Leaves] | None,
    words: list[str],
    said: str,
    plain: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, out = plain
    if change is not None:
        weights = {name: leaf for name, leaf in restored(out).items() if name != "step"}
        out = save({"params": {"params": nested(change(weights))}}, tmp_path / "changed")
    given = [f"--hf_model_path={model}", f"base_output_directory={tmp_path / 'new'}"]
    line = refused(capsys, str(out), "scan_layers=false", *given, *words)
    assert re.search(said, line) and not (tmp_path / "new").exists()


@pytest.mark.parametrize("train", [False, True])
def test_layers_of_several_dtypes(
    train: bool, plain: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = plain
    weights = {name: leaf for name, leaf in restored(out).items() if name != "step"}
    apart = layers_of(3, 1, weights)
    name = "params.params.decoder.layers_1.mlp.wo.kernel"
    apart[name] = apart[name].astype(np.float32) / np.float32(3)
    tree = {"params": {"params": nested(apart)}}
    if train:
        moments = {"params": tree["params"]["params"]}
        tree = state({n: x.astype(BF16) for n, x in apart.items()}, {})
        tree["opt_state"][0]["mu"] = moments
    mixed = save(tree, tmp_path / "mixed")
    given = [f"--hf_model_path={model}", "scan_layers=true", *["--train_state"] * train]
    line = refused(capsys, str(mixed), *given, f"base_output_directory={tmp_path / 'new'}")
    mend = "remove --train_state." if train else "give all a --save_dtype=."
    assert "is bfloat16, but" in line and f"is float32, so they cannot be stacked; {mend}" in line
    assert not (tmp_path / "new").exists()
    if not train:
        relayout(mixed, tmp_path / "new", *given, "--save_dtype=float32")
        got = restored(tmp_path / "new")["params.params.decoder.layers.mlp.wo.kernel"]
        layers = [apart[name.replace("_1", f"_{i}")].astype(np.float32) for i in range(3)]
        np.testing.assert_array_equal(got, np.stack(layers, 1))


@pytest.mark.slow
def test_an_axis_that_is_not_recorded_is_found(tmp_path: Path) -> None:
    """And is kept where no argument names another."""
    model, out = converted("llama3.1-8b", True, tmp_path / "out", "param_scan_axis=0")
    apart = converted("llama3.1-8b", False, tmp_path / "apart")[1]
    relayout(out, tmp_path / "kept", "ici_fsdp_parallelism=4", "ici_tensor_parallelism=2")
    assert_same(restored(tmp_path / "kept"), restored(out))
    for checkpoint in (out, tmp_path / "kept"):
        given = [f"--hf_model_path={model}", "scan_layers=false"]
        relayout(checkpoint, tmp_path / "known", *given, "--overwrite")
        (checkpoint / "maxconv.json").unlink()
        relayout(checkpoint, tmp_path / "found", *given, "--overwrite")
        for made in ("known", "found"):
            assert_same(restored(tmp_path / made), restored(apart))


FORMS = [
    ["checkpoint_storage_use_ocdbt=false"],
    ["checkpoint_storage_use_zarr3=false", "--use_compression"],
    ["checkpoint_storage_use_ocdbt=false", "checkpoint_storage_use_zarr3=false"],
]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_storage_formats(form: list[str], tmp_path: Path) -> None:
    """Of what is read, and of what is written."""
    model, out = converted("llama3.1-8b", True, tmp_path / "out", *form)
    apart = converted("llama3.1-8b", False, tmp_path / "apart")[1]
    job = relayout(out, tmp_path / "there", "scan_layers=false", *MESHES["fsdp4_tp2"])
    assert job.source.stats.bytes_read == stored_nbytes(out)
    assert_same(restored(tmp_path / "there"), restored(apart))
    relayout(tmp_path / "there", tmp_path / "back", "scan_layers=true", *form, *MESHES["fsdp4_tp2"])
    assert_same(restored(tmp_path / "back"), restored(out))
    metadata = [json.loads((d / "0/items/_METADATA").read_text()) for d in (out, tmp_path / "back")]
    assert metadata[0] == metadata[1]
    assert cli.main(["verify", str(tmp_path / "back")]) == 0


@pytest.mark.parametrize(
    "case", ["llama3.1-8b", pytest.param("deepseek3-671b", marks=pytest.mark.slow)]
)
def test_other_dtypes_and_fewer_layers(case: str, tmp_path: Path) -> None:
    """What a family keeps in float32 stays so, as in a conversion; each weight is rounded once."""
    model = tiny.write(case, tmp_path / "hf", dtype="float32")
    words = [w for w in tiny.maxtext_words(case, True) if "scan_layers" not in w]
    count = tiny.CASES[case].config["num_hidden_layers"]
    first = [w for w in words if "num_decoder_layers" not in w]
    first += [f"base_num_decoder_layers={count - 1}", "override_model_config=True"]

    def made(name: str, *more: str) -> Path:
        to = tmp_path / name
        given = [*CPU, *MESHES["fsdp4_tp2"], f"--hf_model_path={model}", "--verify=none", *more]
        convert.run(parse([*given, f"base_output_directory={to}"]))
        return to

    wide = made("wide", *words, "--save_dtype=float32", "scan_layers=true")
    apart = restored(made("apart", *first, "--save_dtype=float32", "scan_layers=false"))
    narrow = restored(made("narrow", *first, "--save_dtype=bfloat16", "scan_layers=false"))
    rounded = {name: leaf.astype(narrow[name].dtype) for name, leaf in apart.items()}
    relayout(wide, tmp_path / "rounded", *first, "--save_dtype=bfloat16", "scan_layers=false")
    assert_same(restored(tmp_path / "rounded"), rounded)
    relayout(tmp_path / "rounded", tmp_path / "widened", *first, "--save_dtype=float32")
    assert_same(
        restored(tmp_path / "widened"),
        {n: x if n == "step" else x.astype(np.float32) for n, x in rounded.items()},
    )


def test_what_is_loaded_is_read_once(plain: tuple[Path, Path]) -> None:
    """In another layout, by steps that are smaller than a chunk."""
    model, out = plain
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    to = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    apart = layers_of(3, 1, {n: x for n, x in restored(out).items() if n != "step"})
    wanted = {"params": {"params": nested(apart)}}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), wanted)
    stored, before = stored_nbytes(out), bytes_read()
    loaded = maxconv.load(str(out), abstract["params"], hf_model_path=str(model), window=1 << 17)
    assert bytes_read() - before < 1.1 * stored + 20_000  # with the index
    jax.tree.map(np.testing.assert_array_equal, loaded, wanted["params"])
