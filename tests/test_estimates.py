"""What a plan says of memory bounds what a conversion holds, measured while it runs."""

import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hubs import TOKEN, hub_in
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from maxconv.algebra import Tensor, apply, rearrange
from maxconv.execution.engine import Engine
from maxconv.planning.estimates import device_estimate, reading_estimate
from maxconv.planning.plan import Leaf, Plan, make_plan
from maxconv.sources import Source, open_source

WINDOW = 24 << 20  # bytes
ROWS, COLUMNS, TENSORS = 1024, 2048, 12  # float32: 8 MiB each


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path, str]]:
    """A server, and a model that it has as well as a directory has it."""
    with hub_in(tmp_path_factory.mktemp("hub")) as hub:
        model = hub.root / "tiny/model"
        model.mkdir(parents=True)
        array = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)
        save_file({f"w{i}": array + i for i in range(TENSORS)}, model / "model.safetensors")
        (model / "config.json").write_text("{}")
        yield hub.url, model, "tiny/model"


def plan_of(source: Source, spec: PartitionSpec, transposed: bool) -> Plan:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    leaves = [leaf(source, i, NamedSharding(mesh, spec), transposed) for i in range(TENSORS)]
    assert isinstance(mesh, Mesh)
    return make_plan(leaves, source.tensors, mesh, WINDOW // 8, WINDOW // 4)


def leaf(source: Source, i: int, sharding: NamedSharding, transposed: bool) -> Leaf:
    expr = Tensor(f"w{i}", source.tensors[f"w{i}"].shape)
    made = apply(rearrange("a b -> b a"), expr) if transposed else expr
    return Leaf(f"params.{i}", made, np.dtype(np.float32), sharding)


def live_nbytes() -> Counter[int]:
    """Bytes of arrays on each device; views of the same memory count once."""
    seen: dict[tuple[int, int], int] = {}
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            data = shard.data
            seen[shard.device.id, data.unsafe_buffer_pointer()] = data.nbytes
    held: Counter[int] = Counter()
    for (device, _), nbytes in seen.items():
        held[device] += nbytes
    return held


def run(plan: Plan, source: Source) -> tuple[int, int]:
    """Bytes at most that a device held, and that numpy and Python held."""
    most = 0
    tracemalloc.start()
    try:
        with Engine(plan, source, WINDOW) as engine:
            for group in plan.groups:
                made = engine.make_slabs([slab for _, slab in group])
                most = max(most, max(live_nbytes().values()))
                del made
        return most, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("spec", "transposed"),
    [
        (PartitionSpec("x", "y"), False),
        (PartitionSpec(None, ("x", "y")), False),  # columns: blocks are scattered
        (PartitionSpec("y", None), True),
        (PartitionSpec(), False),  # each device has all of what is read ahead
    ],
)
@pytest.mark.parametrize("remote", [False, True])
def test_what_is_held_is_within_the_estimates(
    spec: PartitionSpec, transposed: bool, remote: bool, hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, directory, name = hub
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with open_source(name, token=TOKEN) if remote else open_source(str(directory)) as source:
        source.allow(WINDOW // 2)
        plan = plan_of(source, spec, transposed)
        device, host = run(plan, source)
        assert device <= device_estimate(plan, WINDOW)
        assert host <= reading_estimate(plan, WINDOW, source) + (4 << 20)  # Python's own
