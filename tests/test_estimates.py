"""What a plan says of memory bounds what a conversion holds, measured while it runs."""

import gc
import json
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from hubs import TOKEN, hub_in
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jobs import CPU
from safetensors.numpy import save_file

from maxconv.algebra import Tensor, apply, rearrange
from maxconv.cli import demo
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
    gc.collect()  # of arrays whose shards were looked at, which are in cycles in JAX 0.10.0
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
    gc.collect()
    gc.freeze()  # what was there before: else it would be searched each time
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
        gc.unfreeze()


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


WHOLE = """
import json, sys
from pathlib import Path
from maxconv.cli.commands import start
from maxconv.execution.malloc import keep_freed
from maxconv.execution.memory import host_memory
from maxconv.jobs import convert, prepare
from maxconv.planning.estimates import device_estimate, host_estimate

keep_freed()
prepare.window_of = lambda config: int(sys.argv[1])
config, save, began = start(sys.argv[2:]), convert._save, []

def measured(*arguments):
    began.append(host_memory())
    save(*arguments)

convert._save = measured
job = convert.run(config)
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
estimates = [of(job.plan, job.window, *more) for of, more in
             ((host_estimate, [job.source]), (device_estimate, []))]
print(json.dumps([peak - began[0], *estimates, job.plan.output_nbytes]))
"""
LIBRARIES = 96 << 20  # bytes that compiling programs, and Orbax, take while it runs; measured


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["ici_fsdp_parallelism=8", "ici_tensor_parallelism=8"])
@pytest.mark.parametrize("remote", [False, True])
def test_a_whole_conversion_is_within_the_estimates(
    mesh: str, remote: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing included. Simulated devices have their memory in the host's."""
    sizes = {"num_hidden_layers": 12, "vocab_size": 32_000, "hidden_size": 1024}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 2816}
    for name, size in {**sizes, **heads}.items():
        monkeypatch.setitem(demo.CONFIG, name, size)
    with hub_in(tmp_path) as hub:
        demo.write_checkpoint(model := hub.root / "org/llama")
        where = "hf://org/llama" if remote else str(model)
        words = [*CPU, mesh, f"--hf_model_path={where}", "--verify=none"]
        words.append(f"base_output_directory={tmp_path / 'out'}")
        done = hub.run("-c", WHOLE, str(64 << 20), *words, HF_TOKEN=TOKEN)
        shutil.rmtree(model)
    assert done.returncode == 0, done.stderr
    grown, host, device, whole = json.loads(done.stdout.splitlines()[-1])
    bound = host + 8 * device + LIBRARIES
    assert grown <= bound, (grown >> 20, host >> 20, device >> 20)
    assert bound < whole or remote, (bound >> 20, whole >> 20)  # else it would say nothing
