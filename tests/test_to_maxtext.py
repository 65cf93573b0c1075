"""The drop-in for MaxText's to_maxtext: its command line, and its names in Python."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
from headers import published
from jobs import CPU, job_words
from orbax.checkpoint import v1 as ocp
from test_checkpoint import files, stored

from maxconv import cli, to_maxtext
from maxconv.config import parse
from maxconv.errors import UserError
from maxconv.targets import orbax, streaming
from maxconv.targets.lazy import LazyTensor
from maxconv.to_maxtext import LazyHFLoader, get_maxtext_model_info

CASE = "llama3.1-8b"
QUICK = "--verify=none"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(CASE, tmp_path_factory.mktemp("model") / "hf")


def words(hf: Path, out: Path, scan: bool = True) -> list[str]:
    said = job_words(out.parent, hf, tiny.maxtext_words(CASE, scan), "fsdp8")
    return [*said, f"base_output_directory={out}"]


def same(one: Path, other: Path) -> None:
    """Asserts that two checkpoints hold the same."""
    assert files(one) == files(other)
    if (one / "0/items/manifest.ocdbt").exists():
        assert stored(one / "0/items") == stored(other / "0/items")


def test_as_a_person_would(hf: Path, tmp_path: Path) -> None:
    """MaxText's words, and its default directory; 16 devices, as it simulates."""
    model = tiny.maxtext_words(CASE, True)
    command = [sys.executable, "-m", "maxconv.to_maxtext", "maxtext/configs/base.yml", *model]
    command += [*CPU, "hf_access_token=secret", f"hf_model_path={hf}", QUICK]
    command += ["checkpoint_storage_use_ocdbt=false"]  # of which Orbax warns
    env = os.environ | {"PYTHONPATH": str(Path(to_maxtext.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary, saved, to_train = done.stdout.splitlines()
    items = tmp_path / "mt_output/0/items"
    assert summary.startswith("12 leaves, 120.8 KiB in ")
    assert (saved, to_train.split()[-1]) == (f"saved: {items}", f"load_parameters_path={items}")
    assert (items / "_METADATA").exists()
    assert all(line.startswith("note: ") for line in done.stderr.splitlines()), done.stderr
    assert "secret" not in (tmp_path / "mt_output/maxconv.json").read_text()


@pytest.mark.parametrize(
    "format",
    [
        (),
        ("scan_layers=false", "--use_compression"),
        ("checkpoint_storage_use_ocdbt=false",),
        ("checkpoint_storage_use_zarr3=false",),
        ("checkpoint_storage_use_ocdbt=false", "checkpoint_storage_use_zarr3=false"),
    ],
    ids=" ".join,
)
def test_eager_is_lazy(hf: Path, tmp_path: Path, format: tuple[str, ...]) -> None:
    for lazy in (True, False):
        out = tmp_path / str(lazy)
        to_maxtext.main(["to_maxtext", *words(hf, out), *format, QUICK], lazy)
        assert (out / "0/items/manifest.ocdbt").exists() == ("ocdbt=false" not in str(format))
    same(tmp_path / "True", tmp_path / "False")


def test_the_arguments_of_main(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's name is optional, an argument is a default, and paths may be relative."""
    monkeypatch.chdir(tmp_path)
    without = [word for word in words(hf, tmp_path) if "hf_model_path" not in word]
    rest = [*without, "base_output_directory=one", QUICK]
    to_maxtext.main(["base.yml", *rest], hf_model_path=str(hf), save_dtype="float32")
    rest = [*without, "base_output_directory=./two/../two", QUICK, f"--hf_model_path={hf}"]
    rest += ["save_dtype=float32"]
    to_maxtext.main(["program", "base.yml", *rest], hf_model_path="none", save_dtype="bfloat16")
    same(tmp_path / "one", tmp_path / "two")
    assert (
        b'"float32"'
        in stored(tmp_path / "one/0/items")[b"params.params.token_embedder.embedding/zarr.json"]
    )
    for wrong in ([], ["program"], ["program", "base.yml", "foo=1"]):
        with pytest.raises(UserError):
            to_maxtext.main(wrong)


def test_it_loads_as_maxtext_loads_it(hf: Path, tmp_path: Path) -> None:
    """The tree of get_maxtext_model_info is that of the checkpoint, and holds the tensors."""
    said = words(hf, tmp_path / "out")
    to_maxtext.main(["", *said, QUICK])
    info, treedef = get_maxtext_model_info(parse(said))
    shapes: list[Any] = [None] * len(info)
    for position, shape in info.values():
        shapes[position] = jax.ShapeDtypeStruct(shape, ml_dtypes.bfloat16)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device),
        jax.tree.unflatten(treedef, shapes),
    )
    with orbax.context():
        state = ocp.load(str(tmp_path / "out/0"), {"params": abstract}, checkpointable_name="items")
    leaves = jax.tree.leaves(state["params"])
    loader = LazyHFLoader(str(hf), None)
    position, _ = info["params-token_embedder-embedding"]
    table = loader.get_tensor("model.embed_tokens.weight")
    np.testing.assert_array_equal(np.asarray(leaves[position]), table)
    position, shape = info["params-decoder-layers-mlp-wi_0-kernel"]
    gates = [loader.get_tensor(f"model.layers.{i}.mlp.gate_proj.weight").T for i in range(3)]
    assert shape == (42, 3, 52)
    np.testing.assert_array_equal(np.asarray(leaves[position]), np.stack(gates, 1))


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unscanned"])
def test_model_info_is_that_of_maxtext(scan: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maxconv.jobs.prepare.open_source", lambda *_, **__: published(CASE))
    info, treedef = get_maxtext_model_info(parse([f"model_name={CASE}", f"scan_layers={scan}"]))
    name = f"{CASE}.{'scan' if scan else 'unscan'}.json.gz"
    recorded = (Path(__file__).parent / "data/trees" / name).read_bytes()
    theirs = json.loads(gzip.decompress(recorded))["leaves"]
    want = {"-".join(["params", *leaf["path"]]): tuple(leaf["shape"]) for leaf in theirs}
    assert {key: shape for key, (_, shape) in info.items()} == want
    tree = jax.tree.unflatten(treedef, list(info))
    for path, key in jax.tree_util.tree_flatten_with_path(tree)[0]:
        assert key == "-".join(node.key for node in path)
    positions = [position for position, _ in info.values()]
    assert positions == list(range(treedef.num_leaves)) and list(tree) == ["params"]


def test_model_info_of_a_bad_checkpoint(hf: Path, tmp_path: Path) -> None:
    said = words(hf, tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        get_maxtext_model_info(parse([*said, f"--hf_model_path={tmp_path}/none"]))
    small = tiny.write("qwen3-0.6b", tmp_path / "qwen")
    (small / "config.json").write_text((hf / "config.json").read_text())
    with pytest.raises(UserError, match="has no lm_head.weight, but tie_word_embeddings is"):
        get_maxtext_model_info(parse([*said, f"--hf_model_path={small}"]))


@pytest.mark.parametrize("shard_bytes", [40_000, None], ids=["index", "single file"])
def test_loader(tmp_path: Path, shard_bytes: int | None) -> None:
    directory = str(tiny.write(CASE, tmp_path, dtype="float16", shard_bytes=shard_bytes))
    name, shape = "model.layers.1.mlp.down_proj.weight", (42, 52)
    published = tiny.values(name, shape).astype(np.float16)
    loader = LazyHFLoader(directory, None)
    assert (loader.model_id, loader.token, loader.revision) == (directory, None, None)
    assert (loader.save_dtype, loader.is_local) == ("bfloat16", True)
    got = loader.get_tensor(name)
    assert type(got) is np.ndarray and got.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(got, published.astype(np.float32).astype(ml_dtypes.bfloat16))
    exact = LazyHFLoader(directory, "token", revision="main", save_dtype="float32")
    got = exact.get_tensor(name)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, published.astype(np.float32))
    with pytest.raises(ValueError, match=r"There is no tensor 'lm_head\.bias' in "):
        loader.get_tensor("lm_head.bias")


def test_loader_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not of the form hf://org/name"):
        LazyHFLoader("hf://name", None)
    with pytest.raises(UserError, match="config.json"):
        LazyHFLoader(str(tmp_path), None)


def test_names() -> None:
    assert to_maxtext.LazyTensor is LazyTensor
    assert to_maxtext.LazyTensorHandler is streaming.LazyTensorHandler
    assert all(hasattr(to_maxtext, name) for name in to_maxtext.__all__)


def test_verify_finds_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny.write("qwen3-8b", tmp_path / "hf")
    words = job_words(tmp_path, model, tiny.maxtext_words("qwen3-8b", True), "fsdp4_tp2")
    assert cli.main(["convert", *words, "--verify=none"]) == 0
    monkeypatch.chdir(tmp_path)
    for path in ("out", "out/0", "out/0/items"):
        assert cli.main(["verify", path]) == 0
    assert capsys.readouterr().out.count("verified 14 of 14 leaves bit for bit") == 3
    damaged = max((tmp_path / "out/0/items").rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert cli.main(["verify", "out"]) == 1
    said = capsys.readouterr().err
    assert "differs from its source; do not train from it" in said and "Traceback" not in said
    assert cli.main(["verify", "hf"]) == 2
