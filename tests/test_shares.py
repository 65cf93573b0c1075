"""Every needed byte is read once over all processes, in even parts, and reaches who needs it."""

import json
from collections.abc import Mapping

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from plans import make_leaf
from test_engine import LEAVES, arrays, plan_of, source  # noqa: F401
from test_processes import processes, said, stored

from maxconv import cli
from maxconv.algebra import Box, Shape, evaluate, slices
from maxconv.execution.engine import Engine
from maxconv.planning import cells, lanes, redistribution
from maxconv.planning.placement import device_boxes
from maxconv.planning.redistribution import cell_read
from maxconv.planning.slicing import slices_of

MESH = jax.make_mesh((2, 2, 2), ("x", "y", "z"), axis_types=(AxisType.Auto,) * 3)
BF16 = np.dtype(jax.numpy.bfloat16)


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.slow), 8])
def hosts(request, monkeypatch):
    """So many hosts, with the eight devices of this process in even parts."""

    def boxes_by_process(sharding: NamedSharding, shape: Shape) -> Mapping[int, frozenset[Box]]:
        boxes: dict[int, set[Box]] = {process: set() for process in range(request.param)}
        for device, box in device_boxes(sharding, shape).items():
            boxes[device.id * request.param // 8].add(box)
        return {process: frozenset(of) for process, of in boxes.items()}

    monkeypatch.setattr(redistribution, "boxes_by_process", boxes_by_process)
    monkeypatch.setattr(lanes, "local_devices", lambda sharding: 8 // request.param)
    caches = (cells._recipe, slices_of, cells._at_once)
    for cached in caches:
        cached.cache_clear()
    yield request.param
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize("budget", [1 << 20, 300])
@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_is_its_expression(name, budget, hosts, source, arrays):  # noqa: F811
    plan = plan_of(source, LEAVES[name], budget)
    (leaf,) = plan.leaves
    with Engine(plan, source, window=1 << 20) as engine:
        made = make_leaf(engine, leaf)
    want = evaluate(leaf.leaf.expr, arrays).astype(leaf.dtype)
    np.testing.assert_array_equal(np.asarray(made).view(np.uint16), want.view(np.uint16))
    assert made.sharding == leaf.sharding
    assert sum(map(plan.read_nbytes, range(hosts))) == plan.needed_nbytes
    if name.startswith("experts, ") and budget > 300 and hosts > 2:  # so that whole ones are read
        assert all(step.recipe.lanes_in_shard > 1 for step in leaf.steps)


@pytest.mark.parametrize(
    ("shape", "spec", "moves", "copies"),
    [
        ((64, 32), P("x", "y"), [("y", 1)], ("z",)),
        ((64, 32), P(None, ("x", "y")), [("x", 1), ("y", 1)], ("z",)),
        ((64, 32), P(), [], ("x", "y", "z")),
        ((64, 32), P(("z", "x", "y")), None, None),  # rows already
        ((4, 32, 32), P(None, "x", "y"), [("y", 2)], ("z",)),  # its first axis is too short
        ((7, 32), P(None, "x"), [], ("y", "z")),  # and this, too: cut along the other
    ],
)
def test_mesh_axes_move_to_the_rows(shape, spec, moves, copies, monkeypatch):
    monkeypatch.setattr(
        redistribution,
        "boxes_by_process",
        lambda *args: {d.id: frozenset([box]) for d, box in device_boxes(*args).items()},
    )
    read = cell_read(shape, BF16, NamedSharding(MESH, spec), shape, False)
    if moves is None:
        assert read.share is None
        return
    assert read.share is not None
    assert (list(read.share.moves), read.share.copies) == (moves, copies)
    assert sum(read.nbytes_by_process.values()) == 2 * np.prod(shape)


@pytest.mark.parametrize("rows", [40, 42, 1187])
def test_shares_differ_by_one_row_at_most(rows, hosts):
    read = cell_read((rows, 16), BF16, NamedSharding(MESH, P(None, "x")), (rows, 16), False)
    counts = [nbytes // 32 for nbytes in read.nbytes_by_process.values()]
    assert sum(counts) == rows and max(counts) - min(counts) <= 8 // hosts  # one a device
    array = np.arange(rows * 16, dtype=np.uint16).reshape(rows, 16)
    as_read, sharding = read.as_read

    def part(index):
        box = tuple(s.indices(n)[:2] for s, n in zip(index, as_read, strict=True))
        held = np.zeros(read.buffer(box), np.uint16)
        for within, of in read.pieces(box):
            held[slices(within)] = array[slices(of)]
        return held.reshape([b - a for a, b in box])

    shared = jax.make_array_from_callback(as_read, sharding, part)
    np.testing.assert_array_equal(jax.jit(read.local)(shared), array)


MESHES = {
    "fsdp": "ici_fsdp_parallelism=8",
    "tensor": "ici_fsdp_parallelism=2 ici_tensor_parallelism=4",
    "replicas": "ici_data_parallelism=4 ici_fsdp_parallelism=2",
    "mixed": "ici_data_parallelism=2 ici_fsdp_parallelism=2 ici_tensor_parallelism=2",
}
EXPERTS = {
    "experts": "ici_expert_parallelism=4 ici_fsdp_parallelism=2",
    "replicas": "ici_data_parallelism=4 ici_expert_parallelism=2",
    "mixed": "ici_expert_parallelism=2 ici_fsdp_parallelism=2 ici_tensor_parallelism=2",
}
# Converts to one mesh after another, and says what was read of what was to be.
PROGRAM = """
import json, sys
import jax
from maxconv.jobs import convert
from maxconv.config import parse
from maxconv.cli.commands import start

meshes, out, *words = sys.argv[1:]
for name, mesh in json.loads(meshes).items():
    config = [*words, *mesh.split(), f"base_output_directory={out}/{name}"]
    job = convert.run(start(config))
    mine = jax.process_index()
    counts = job.source.stats.bytes_read, job.plan.read_nbytes(mine), job.plan.needed_nbytes
    print("read", json.dumps([name, *counts]))
"""


@pytest.mark.parametrize(
    ("n", "case", "scan", "meshes"),
    [
        pytest.param(2, "llama3.1-8b", True, MESHES, marks=pytest.mark.slow),
        pytest.param(4, "llama3.1-8b", False, {"mixed": MESHES["mixed"]}, marks=pytest.mark.slow),
        pytest.param(
            2, "qwen3-30b-a3b", False, {"mixed": EXPERTS["mixed"]}, marks=pytest.mark.slow
        ),
        pytest.param(4, "qwen3-30b-a3b", True, EXPERTS, marks=pytest.mark.slow),
    ],
)
def test_processes_read_once_what_is_planned(n, case, scan, meshes, tmp_path):
    model = tiny.write(tiny.EVEN[case], tmp_path / "hf")
    words = [*tiny.maxtext_words(tiny.EVEN[case], scan), f"--hf_model_path={model}"]
    words += ["hardware=cpu", "--verify=none", f"--simulated_cpu_devices_count={8 // n}"]
    arguments = [json.dumps(meshes), str(tmp_path / "several"), *words]
    with processes(n, arguments, tmp_path / "logs", PROGRAM) as running:
        codes = [process.wait(timeout=240) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [0] * n, "\n".join(logs)
    for name, mesh in meshes.items():
        lines = [line for log in logs for line in log.splitlines() if line.startswith("read ")]
        read, planned, needed = zip(
            *(counts for of, *counts in (json.loads(li[5:]) for li in lines) if of == name),
            strict=True,
        )
        assert read == planned and len(read) == n
        assert sum(read) == needed[0], name
        assert max(read) <= 1.05 * needed[0] / n, name
        one = tmp_path / "one" / name
        out = [*mesh.split(), "skip_jax_distributed_system=true", f"base_output_directory={one}"]
        alone = [word for word in words if not word.startswith("--simulated")]
        assert cli.main(["convert", *alone, *out]) == 0
        assert stored(one) == stored(tmp_path / "several" / name)
