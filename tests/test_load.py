"""Loading into a process, against what Orbax restores of a conversion, and against numpy."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import tiny
import yaml
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from test_export import converted
from test_processes import processes, said

import maxconv
from maxconv.errors import UserError
from maxconv.planning import placement

pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
SIZES = ("use_multimodal", "use_audio", "vocab_size")  # of the arguments of a conversion
MESH = {"fsdp": 4, "tensor": 2}


def mesh(axes: dict[str, int], *, explicit: bool = False) -> Mesh:
    kind = AxisType.Explicit if explicit else AxisType.Auto
    devices = np.array(jax.devices()[:8]).reshape(*axes.values())
    return Mesh(devices, tuple(axes), axis_types=(kind,) * len(axes))


def restored(out: Path) -> Any:
    """The parameters of a checkpoint, as Orbax gives them."""
    return ocp.PyTreeCheckpointer().restore(out / "0/items")["params"]


def arguments(case: str) -> dict[str, Any]:
    words = dict(word.split("=", 1) for word in tiny.maxtext_words(case, True))
    return {key: yaml.safe_load(words[key]) for key in SIZES if key in words}


def assert_same(loaded: Any, want: Any) -> None:
    """That two trees have the same bits."""
    ours, theirs = (dict(jax.tree_util.tree_flatten_with_path(tree)[0]) for tree in (loaded, want))
    assert [*ours] == [*theirs]
    for path, array in ours.items():
        found, expected = np.asarray(array), np.asarray(theirs[path])
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), path
        assert found.tobytes() == expected.tobytes(), path


SLOW = (
    *("deepseek3-671b", "gemma3-4b+vision", "gemma4-e2b", "gpt-oss-20b+mxfp4", "llama3.1-8b"),
    *("olmo3-7b", "qwen3-next-80b-a3b", "qwen3.5-35b-a3b-fp8", "qwen3-vl-2b"),
)


def layouts() -> Iterator[Any]:
    """One layout of some cases; the one that is not slow has experts."""
    for case, scan in dict(reversed(tiny.LAYERS)).items():
        marks = () if case == "qwen3-30b-a3b" else pytest.mark.slow
        if case in (*SLOW, "qwen3-30b-a3b"):
            yield pytest.param(case, scan, marks=marks)


@pytest.mark.parametrize(("case", "scan"), [*layouts()])
def test_what_is_loaded_is_what_is_converted(case: str, scan: bool, tmp_path: Path) -> None:
    model, out = converted(case, scan, tmp_path)
    save = tiny.CASES[case].save_dtypes[0]
    words = {"scan_layers": scan, "dtype": save, **arguments(case)}
    abstract = maxconv.abstract(str(model), mesh=mesh(MESH), **words)
    if not save.startswith("float8"):  # whose scales are in the checkpoint alone
        described = maxconv.abstract(str(model / "config.json"), mesh=mesh(MESH), **words)
        assert described == abstract
    want = restored(out)
    loaded = maxconv.load(str(model), abstract)
    assert_same(loaded, want)
    jax.tree.map(lambda array, to: array.sharding == to.sharding or pytest.fail(), loaded, abstract)
    assert_same(maxconv.load(str(out), abstract), want)


OTHERS = [
    pytest.param("qwen3-0.6b", True, 1),
    pytest.param("qwen3-30b-a3b", False, 0, marks=pytest.mark.slow),
    pytest.param("gemma3-4b+vision", True, 1, marks=pytest.mark.slow),
    pytest.param("qwen3-next-80b-a3b", False, 1, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("case", "scan", "axis"), OTHERS)
def test_a_checkpoint_in_another_layout(case: str, scan: bool, axis: int, tmp_path: Path) -> None:
    """It is loaded as what is converted in the wanted layout; and described as that."""
    model, out = converted(case, scan, tmp_path)
    words = {**arguments(case), "scan_layers": not scan, "param_scan_axis": axis}
    abstract = maxconv.abstract(str(model), mesh=mesh(MESH), **words)
    want = maxconv.load(str(model), abstract, param_scan_axis=axis)
    assert_same(maxconv.load(str(out), abstract, param_scan_axis=axis), want)
    layout = {key: words[key] for key in ("scan_layers", "param_scan_axis")}
    described = maxconv.abstract(str(out), mesh=mesh(MESH), **layout)
    assert described == abstract
    as_it_is = maxconv.abstract(str(out), mesh=mesh(MESH))
    assert_same(maxconv.load(str(out), as_it_is), restored(out))
    if case == "qwen3-0.6b":
        moved = out.rename(tmp_path / "moved")
        (moved / "maxconv.json").unlink()
        with pytest.raises(UserError, match="has another layout than abstract, or is of another"):
            maxconv.load(str(moved), abstract)
        assert_same(maxconv.load(str(moved), abstract, hf_model_path=str(model)), want)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return converted("qwen3-0.6b", True, tmp_path_factory.mktemp("qwen"))


def shaped(tree: Any, over: Mesh, dtype: Any = None) -> Any:
    """The shapes of arrays, their largest axis divided over a mesh if that is possible."""

    def one(array: Any) -> jax.ShapeDtypeStruct:
        n = over.shape[over.axis_names[0]]
        at = next((i for i, size in enumerate(array.shape) if size % n == 0), None)
        spec = PartitionSpec(*(over.axis_names[0] if i == at else None for i in range(array.ndim)))
        sharding = NamedSharding(over, spec)
        return jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=sharding)

    return jax.tree.map(one, tree)


@pytest.mark.parametrize("kind", ["other axes", "explicit", "one device", "replicated"])
def test_any_sharding(kind: str, qwen: tuple[Path, Path]) -> None:
    model, out = qwen
    want = restored(out)
    if kind == "one device":
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want)
    elif kind == "replicated":
        everywhere = NamedSharding(mesh({"x": 8}), PartitionSpec())
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), want
        )
    else:
        abstract = shaped(want, mesh({"rows": 2, "columns": 4}, explicit=kind == "explicit"))
    loaded = maxconv.load(str(model), abstract)
    assert_same(loaded, want)
    for array, to in zip(jax.tree.leaves(loaded), jax.tree.leaves(abstract), strict=True):
        assert to.sharding is None or array.sharding == to.sharding


def test_a_subset_in_a_train_state(qwen: tuple[Path, Path]) -> None:
    model, out = qwen
    want = restored(out)
    params = {
        "params": {"decoder": {"layers": {"mlp": want["params"]["decoder"]["layers"]["mlp"]}}}
    }
    abstract = shaped(params, mesh({"x": 8}), dtype=np.float32)
    state = TrainState.create(apply_fn=lambda: None, params=params, tx=optax.sgd(0.1))
    loaded = state.replace(params=maxconv.load(str(model), abstract))
    wider = jax.tree.map(lambda x: np.asarray(x).astype(np.float32), params)
    assert_same(loaded.params, wider)


def test_an_nnx_state(qwen: tuple[Path, Path]) -> None:
    """As MaxText's NNX models have it: bare weights, in variables."""
    model, out = qwen
    want = restored(out)["params"]

    class Model(nnx.Module):
        def __init__(self, tree: Any):
            for name, value in tree.items():
                inner = Model(value) if isinstance(value, dict) else nnx.Param(value)
                setattr(self, name, inner)

    graph, state = nnx.split(Model(want))
    abstract = shaped(state, mesh({"x": 8}))
    loaded = maxconv.load(str(model), abstract)
    assert isinstance(loaded, nnx.State)
    assert_same(nnx.to_pure_dict(loaded), nnx.to_pure_dict(state))
    assert nnx.state(nnx.merge(graph, loaded)) == loaded


def test_tensors_of_hugging_face(qwen: tuple[Path, Path]) -> None:
    model, _ = qwen
    want = {}
    for file in model.glob("*.safetensors"):
        with safe_open(file, "np") as opened:
            want |= {name: opened.get_tensor(name) for name in opened.keys()}
    name = "model.layers.0.mlp.up_proj.weight"
    abstract = shaped({name: want[name]}, mesh({"x": 8}))
    assert_same(maxconv.load(str(model), abstract, layout="hf"), {name: want[name]})


def test_arrays_come_one_by_one_and_replace_others(qwen: tuple[Path, Path]) -> None:
    model, out = qwen
    want = restored(out)
    old = jax.tree.map(lambda x: jax.device_put(np.zeros_like(x)), want)
    told: list[tuple[int, int]] = []
    seen = 0
    for path, array in maxconv.stream(
        str(model), old, donate=True, progress=lambda done, total: told.append((done, total))
    ):
        replaced, expected = old, want
        for key in path:
            replaced, expected = replaced[key], expected[key]
        assert replaced.is_deleted()
        assert np.asarray(array).tobytes() == np.asarray(expected).tobytes()
        seen += 1
    assert seen == len(jax.tree.leaves(want)) == len(told)
    total = sum(x.nbytes for x in jax.tree.leaves(want))
    assert told[-1] == (total, total)
    assert placement.local_boxes.cache_info().currsize == 0  # which would hold the caller's mesh


def test_the_example_of_the_guide_runs(qwen: tuple[Path, Path]) -> None:
    model, out = qwen
    page = (Path(maxconv.__file__).parent / "guide/process.md").read_text()
    blocks = re.findall("```python\n(.*?)```", page, re.DOTALL)
    first, training, module, sync, _ = (block.replace("org/name", str(model)) for block in blocks)
    replaced: dict[Any, Any] = {}
    tokens = np.random.default_rng(0).integers(0, 100, (4, 16), np.int32)
    names: dict[str, Any] = {"replace": replaced.__setitem__, "batches": [tokens] * 4}
    exec(first, names)
    want = jax.device_get(restored(out))
    assert_same(names["params"], want)
    exec(training, names)
    assert names["value"] < names["loss"](want, tokens)  # it learns what it is shown
    exec(module, names)
    table = want["params"]["token_embedder"]["embedding"]
    assert_same(jnp.asarray(names["model"].token_embedder.embedding), table)
    wide = table.astype(np.float32)
    np.testing.assert_allclose(names["model"](tokens), wide[tokens] @ wide.T, rtol=2e-2, atol=2e-2)
    exec(sync, names)
    assert len(replaced) == len(jax.tree.leaves(want))


@pytest.mark.parametrize(
    "change",
    ["shape", "name", "no parameter", "sharding", "uneven", "integers", "no weights", "no source"],
)
def test_what_does_not_fit_is_named(change: str, qwen: tuple[Path, Path]) -> None:
    model, out = qwen
    source: Any = str(model)
    abstract = shaped(restored(out), mesh({"x": 8}))
    norm = abstract["params"]["decoder"]["decoder_norm"]
    if change == "shape":
        norm["scale"] = jax.ShapeDtypeStruct((6,), np.float32, sharding=norm["scale"].sharding)
        sentence = r"decoder.decoder_norm.scale has shape \(6,\) in abstract, but \(\d+,\) in"
    elif change == "name":
        norm["bias"] = norm["scale"]
        sentence = "has no 'decoder.decoder_norm.bias'; leave them out of abstract"
    elif change == "no parameter":
        abstract["step"] = norm["scale"]
        sentence = "abstract has 'step', which are no parameters of MaxText"
    elif change == "integers":
        sharding = norm["scale"].sharding
        norm["scale"] = jax.ShapeDtypeStruct(norm["scale"].shape, np.int32, sharding=sharding)
        sentence = "decoder.decoder_norm.scale is to be int32: tensor model.norm.weight is"
    elif change == "sharding":
        on = NamedSharding(mesh({"x": 8}).abstract_mesh, PartitionSpec())
        norm["scale"] = jax.ShapeDtypeStruct(norm["scale"].shape, np.float32, sharding=on)
        sentence = "decoder.decoder_norm.scale has the sharding .*; give it a NamedSharding over"
    elif change == "uneven":
        on = NamedSharding(mesh({"x": 8}), PartitionSpec("x"))
        norm["scale"] = jax.ShapeDtypeStruct((42,), np.float32, sharding=on)
        sentence = r"decoder.decoder_norm.scale of shape \(42,\) cannot be divided evenly"
    elif change == "no weights":
        source, sentence = str(model / "config.json"), "config.json has no weights"
    else:
        source, sentence = str(model / "none"), "does not exist"
    with pytest.raises(UserError, match=sentence):
        maxconv.load(source, abstract)


PROGRAM = """
import sys
from pathlib import Path
from maxconv.config import parse
from maxconv.processes.start import initialize
config = parse(sys.argv[1:])
initialize(config)
import jax, numpy as np, maxconv
from maxconv.errors import ConversionError
from maxconv.sources import LocalSource
mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor"))
model, here = config.hf_model_path, Path(config.base_output_directory)
abstract = maxconv.abstract(model, mesh=mesh)
index = jax.process_index()
for i, array in enumerate(jax.tree.leaves(maxconv.load(model, abstract))):
    for shard in array.addressable_shards:
        starts = [part.start or 0 for part in shard.index]
        raw = np.asarray(shard.data).view(np.uint16)
        np.savez(here / f"{i}-{index}-{shard.device.id}.npz", raw=raw, starts=starts)
def broken(*_):
    raise OSError("the disk broke")
if index:
    LocalSource.read = broken
try:
    maxconv.load(model, abstract)
except ConversionError as error:
    (here / f"error-{index}").write_text(str(error))
"""


@pytest.mark.slow
def test_processes_load_together(tmp_path: Path) -> None:
    model, out = converted("qwen3-30b-a3b", True, tmp_path)
    here = tmp_path / "here"
    here.mkdir()
    words = [f"--hf_model_path={model}", f"base_output_directory={here}", "hardware=cpu"]
    words += ["--simulated_cpu_devices_count=4"]
    with processes(2, words, tmp_path / "logs", PROGRAM) as running:
        assert [process.wait(300) for process in running] == [0, 0], said(tmp_path / "logs")
    want = jax.tree.leaves(restored(out))
    for i, array in enumerate(want):
        files = [*here.glob(f"{i}-*.npz")]
        assert len(files) == 8
        for file in files:
            shard = np.load(file)
            at = tuple(
                slice(start, start + n)
                for start, n in zip(shard["starts"], shard["raw"].shape, strict=True)
            )
            assert (np.asarray(array).view(np.uint16)[at] == shard["raw"]).all()
    first, second = ((here / f"error-{i}").read_text() for i in range(2))
    assert first == second and "the disk broke" in first
