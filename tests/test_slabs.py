"""Leaves that are too large for the window are made, written and verified in slabs."""

import math
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import tiny
from jax.sharding import NamedSharding
from jobs import job_words, tiny_job
from plans import make_plan
from test_engine import LAYERS as INDICES
from test_engine import LEAVES, MESH, arrays, source  # noqa: F401
from test_processes import processes, said

from maxconv import cli
from maxconv.algebra import bind, dims, evaluate, slices
from maxconv.config import parse
from maxconv.execution.engine import Engine
from maxconv.jobs import convert, resume
from maxconv.jobs.prepare import prepared
from maxconv.planning.cells import steps
from maxconv.planning.lanes import Stored
from maxconv.planning.placement import device_boxes
from maxconv.planning.plan import Leaf, LeafPlan, Plan
from maxconv.planning.slabs import Slab, slabs

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("limit", [100, pytest.param(1000, marks=pytest.mark.slow), 4000])
@pytest.mark.parametrize("name", LEAVES)
def test_slabs_tile_their_leaf(name, limit, source, arrays):  # noqa: F811
    template, spec = LEAVES[name]
    expr = bind(template, {n: i.shape for n, i in source.tensors.items()}, INDICES)
    to = NamedSharding(MESH, spec)
    stored = {n: Stored(i.dtype) for n, i in source.tensors.items()}
    made = steps(expr, stored, BF16, to, limit // 2)
    parts = slabs(made, expr.shape, BF16, to, limit)
    leaf = LeafPlan(Leaf("params.params.leaf", expr, BF16, to), parts)
    plan = Plan(MESH, (leaf,), source.tensors)
    want = evaluate(expr, arrays).astype(BF16).view(np.uint16)
    count = np.zeros(expr.shape, int)
    with Engine(plan, source, window=1 << 20) as engine:
        for slab in parts:
            got = np.asarray(engine.make_slabs([slab])[0]).view(np.uint16)
            for box in set(device_boxes(to, slab.shape).values()):
                at = slices(slab.in_leaf(box))
                np.testing.assert_array_equal(got[slices(box)], want[at])
                count[at] += 1
        assert engine.programs.compiled == plan.programs
    assert (count == 1).all()
    assert len({slab.shape for slab in parts}) == 1
    largest = max(step.recipe.made_nbytes for step in made)
    assert parts[0].local_nbytes <= max(limit, 2 * largest) or len(parts) == math.prod(
        n // m for n, m in zip(expr.shape, parts[0].shape, strict=True)
    )


def test_all_of_them_are_small_enough(tmp_path: Path) -> None:
    for case, scan in (("qwen3-30b-a3b", True), ("llama3.1-8b", False)):
        with tiny_job(tmp_path / case, case, scan=scan) as job:
            limit = max(leaf.local_nbytes for leaf in job.plan.leaves) // 4
            config = job.config
            plan = make_plan(
                job.source,
                job.model,
                job.plan.mesh,
                config.logical_axis_rules,
                config.scan_axis,
                budget=limit // 3,
                slab=limit,
            )
            held = [slab.local_nbytes for leaf in plan.leaves for slab in leaf.slabs]
            assert max(held) <= limit and len(held) > len(plan.leaves)
            assert plan.read_nbytes(0) == job.plan.read_nbytes(0)


def values(out: Path) -> dict[str, tuple[np.ndarray, tuple[int, ...]]]:
    """Every array of a checkpoint, and the shape of its chunks."""
    base = {"driver": "file", "path": f"{out / '0' / 'items'}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    found = {}
    for key in store.list().result():
        if key.endswith(b"/zarr.json"):
            spec = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": base}}
            spec["kvstore"]["path"] = key.decode().removesuffix("zarr.json")
            array = ts.open(spec).result()
            found[key.decode()] = array.read().result(), array.chunk_layout.write_chunk.shape or ()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2])
def test_the_checkpoint_is_the_same(n, tmp_path, monkeypatch, capsys):
    case = tiny.EVEN["qwen3-30b-a3b"]
    model = tiny.write(case, tmp_path / "hf")
    words = job_words(tmp_path / "whole", model, tiny.maxtext_words(case, True), "fsdp4_tp2")
    assert cli.main(["convert", *words]) == 0
    words = [*words, f"base_output_directory={tmp_path / 'slabs'}", "--verify=full"]
    if n == 1:
        monkeypatch.setattr("maxconv.jobs.prepare.window_of", lambda config: 32 << 10)
        assert cli.main(["convert", *words]) == 0
        capsys.readouterr()
        assert cli.main(["verify", str(tmp_path / "slabs")]) == 0
        flip_a_bit(tmp_path / "slabs")
        capsys.readouterr()
        assert cli.main(["verify", str(tmp_path / "slabs")]) == 1
        assert re.search(r"differ|cannot be read|damaged", capsys.readouterr().err)
        flip_a_bit(tmp_path / "slabs")
    else:
        program = (
            "import sys; from maxconv import cli; from maxconv.jobs import prepare; "
            "prepare.window_of = lambda c: 32 << 10; "
            "sys.exit(cli.main(['convert', *sys.argv[1:]]))"
        )
        shared = [word for word in words if not word.startswith("skip_jax")]
        with processes(n, shared, tmp_path / "logs", program) as running:
            codes = [process.wait(timeout=240) for process in running]
        assert codes == [0] * n, "\n".join(said(tmp_path / "logs"))
    whole, in_slabs = values(tmp_path / "whole/out"), values(tmp_path / "slabs")
    assert whole.keys() == in_slabs.keys()
    smaller = 0
    for name, (array, chunk) in whole.items():
        assert array.tobytes() == in_slabs[name][0].tobytes(), name
        smaller += math.prod(in_slabs[name][1]) < math.prod(chunk)
    assert smaller > 5
    metadata = [(tmp_path / d / "0/items/_METADATA").read_text() for d in ("whole/out", "slabs")]
    shapeless = [re.sub(r'"write_shape": \[[^]]*\]', "", text) for text in metadata]
    assert shapeless[0] == shapeless[1] and metadata[0] != metadata[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param("gpt-oss-20b", marks=pytest.mark.slow), "gpt-oss-20b+mxfp4"]
)
def test_alternate_columns_are_read_once(case, tmp_path, monkeypatch):
    model = tiny.write(case, tmp_path / "hf")
    words = job_words(tmp_path, model, tiny.maxtext_words(case, True), "fsdp4_tp2")
    monkeypatch.setattr("maxconv.jobs.prepare.window_of", lambda config: 64 << 10)
    job = convert.run(parse([*words, "--verify=none"]))
    together = [group for group in job.plan.groups if len(group) > 1]
    assert {len(group) for group in together} == {2}
    assert len({leaf.name for group in together for leaf, _ in group}) < 2 * len(together)
    assert job.source.stats.bytes_read == job.plan.read_nbytes(0) == job.plan.needed_nbytes
    assert cli.main(["verify", str(tmp_path / "out")]) == 0


def flip_a_bit(out: Path) -> None:
    """In the middle of the largest data file; twice is not at all."""
    file = max(out.glob("0/items/ocdbt.process_0/d/*"), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def test_a_resumed_conversion_has_the_same_slabs(tmp_path: Path) -> None:
    """Chunks of another shape do not fit those that are there."""
    model = tiny.write("llama3.1-8b", tmp_path / "hf")
    words = job_words(tmp_path, model, tiny.maxtext_words("llama3.1-8b", True), "fsdp8")
    identities = []
    for window in (1 << 20, 8 << 10, 2 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("maxconv.jobs.prepare.window_of", lambda config, w=window: w)
            with prepared(parse(words), writes=False) as job:
                identities.append(job.identity)
    assert resume.problem("out", identities[0], identities[2]) is None
    assert "the memory for buffers" in (resume.problem("out", identities[0], identities[1]) or "")


def test_in_leaf_finds_the_shard() -> None:
    to = NamedSharding(MESH, LEAVES["transposed"][1])  # (x, y), z
    slab = Slab((8, 6), BF16, to, (2, 0), (16, 24), ())
    assert slab.in_leaf(((2, 4), (0, 3))) == ((6, 8), (0, 3))
    assert slab.in_leaf(((7, 8), (3, 6))) == ((15, 16), (12, 15))
    assert dims(slab.in_leaf(((0, 2), (0, 3)))) == (2, 3)
