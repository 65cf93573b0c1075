"""On several processes an export reads every stored byte once, and each sends and writes its share.

What was read is counted by the source and, independently, by TensorStore.
"""

import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from headers import published
from jobs import CPU, MESHES
from test_export import read
from test_processes import processes, said
from test_tpu_compile import FOREIGN, devices, uncached  # noqa: F401

from maxconv.algebra import evaluate, hf, rearrange, volume
from maxconv.algebra.boxes import intersect
from maxconv.algebra.expr import apply, bind
from maxconv.algebra.ops import Slice
from maxconv.algebra.together import stacks
from maxconv.cli import demo
from maxconv.config import parse
from maxconv.config.mesh import make_mesh
from maxconv.config.tables import model_facts
from maxconv.execution.program import compile_cell
from maxconv.jobs import convert
from maxconv.jobs.export_shares import planned, shares
from maxconv.jobs.leaves import conversion_leaves
from maxconv.jobs.memory import STEP_MOST, WINDOW_MOST
from maxconv.models.resolve import resolve
from maxconv.models.way_back import ROOT, way_back
from maxconv.planning.owners import Unit, divided
from maxconv.planning.placement import boxes_by_process
from maxconv.planning.plan import Plan
from maxconv.sources import TensorInfo
from maxconv.sources.trees import TreeSource

# Exports one checkpoint after another, and says what was read for it.
PROGRAM = """
import json, sys
import jax
import tensorstore as ts
from maxconv.cli.commands import start
from maxconv.cli.reports import TerminalReporter
from maxconv.jobs import export, prepare_export

def counted():
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])

checkpoints, *words = sys.argv[1:]
for i, (checkpoint, model, out) in enumerate(json.loads(checkpoints)):
    config = [f"--hf_model_path={model}", f"base_output_directory={out}", "--verify=none"]
    config = start([*config, *words], "export")
    with prepare_export.prepared(config, checkpoint) as job:
        before = counted()
        export.run(job, TerminalReporter())
        written = sum(tensor.nbytes for file in job.mine for tensor in file.tensors)
        planned = job.plan.read_nbytes(jax.process_index())
        stored = sum(info.nbytes for info in job.tree.tensors.values())
        read = job.tree.stats.bytes_read
        print("counts", json.dumps([i, read, planned, stored, counted() - before, written]))
"""


def converted(case: str, scan: bool, directory: Path, *words: str) -> tuple[Path, Path]:
    """A checkpoint of even sizes at Hugging Face, and what MaxText has of it, on 8 devices."""
    model = tiny.write(tiny.EVEN[case], directory / "hf")
    given = [*tiny.maxtext_words(tiny.EVEN[case], scan), *CPU, "--verify=none", *words]
    given += [f"--hf_model_path={model}", f"base_output_directory={directory / 'out'}"]
    convert.run(parse(given))
    return model, directory / "out"


EXPERTS = ("ici_expert_parallelism=4", "ici_fsdp_parallelism=2")


@pytest.mark.parametrize(
    ("n", "runs"),
    [
        pytest.param(
            2,
            [
                ("llama3.1-8b", True, "fsdp4_tp2", "--use_compression=true"),
                ("llama3.1-8b", False, "fsdp4_tp2", "--use_compression=true"),
                ("llama3.1-8b", True, "fsdp8", "--save_dtype=float32"),
                ("qwen3-30b-a3b", True, "experts", "--use_compression=true"),
                ("qwen3-30b-a3b", True, "fsdp8", "checkpoint_storage_use_ocdbt=false"),
                ("qwen3-30b-a3b", False, "experts", "checkpoint_storage_use_zarr3=false"),
            ],
            marks=pytest.mark.slow,
        ),
        pytest.param(
            4,
            [
                ("llama3.1-8b", True, "fsdp8", "--use_compression=true"),
                ("qwen3-30b-a3b", True, "experts", "--save_dtype=float32"),
            ],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_processes_read_every_stored_byte_once(
    n: int, runs: list[tuple[str, bool, str, str]], tmp_path: Path
) -> None:
    meshes = {**MESHES, "experts": EXPERTS}
    checkpoints = []
    for i, (case, scan, mesh, word) in enumerate(runs):
        model, out = converted(case, scan, tmp_path / str(i), *meshes[mesh], word)
        checkpoints.append([str(out), str(model), str(tmp_path / str(i) / "back")])
    words = [json.dumps(checkpoints), "hardware=cpu", f"--simulated_cpu_devices_count={8 // n}"]
    with processes(n, words, tmp_path / "logs", PROGRAM) as running:
        codes = [process.wait(timeout=300) for process in running]
    logs = said(tmp_path / "logs")
    assert codes == [0] * n, "\n".join(logs)
    lines = [json.loads(li[7:]) for log in logs for li in log.splitlines() if "counts" in li[:7]]
    for i, (out, model, back) in enumerate(checkpoints):
        of = [counts for number, *counts in lines if number == i]
        bytes_read, planned, stored, from_files, written = zip(*of, strict=True)
        assert len(of) == n and bytes_read == planned, runs[i]
        assert sum(bytes_read) == stored[0], runs[i]
        size = sum(path.stat().st_size for path in Path(out).rglob("*") if path.is_file())
        assert sum(from_files) <= size * 1.1, runs[i]
        assert max(written) <= 1.2 * sum(written) / n, runs[i]  # tiny, with a large embedding
        want = read(Path(model))
        got = read(Path(back))
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            if not name.endswith("q_proj.weight") or "llama" not in runs[i][0]:
                assert got[name] == tensor, (runs[i], name)


def test_chunks_are_counted_whole(tmp_path: Path) -> None:
    _, out = converted("llama3.1-8b", True, tmp_path, *MESHES["fsdp8"])
    with TreeSource(str(out)) as tree:
        info = max(tree.tensors.values(), key=lambda info: info.nbytes)
        assert info.chunk is not None and info.chunk_nbytes < info.nbytes
        box = tuple((0, 1) for _ in info.shape)
        tree.read(info, [(box, np.empty((1,) * len(box), info.dtype))])
        assert tree.stats.bytes_read == info.chunk_nbytes
        assert (tree.tensor(info.name) == tree.plain(info, tuple((0, n) for n in info.shape))).all()
        assert tree.stats.bytes_read == info.chunk_nbytes + info.nbytes


LLAMA_70B = [  # GiB of each stack, and how many tensors it has
    *[(33 * 1.0, 80)] * 3,
    *[(9.4, 80)] * 2,
    *[(1.2, 80)] * 2,
    *[(0.001, 80)] * 2,
    *[(1.96, 1)] * 2,
    (1e-5, 1),
]


@pytest.mark.parametrize("processes", [2, 3, 4, 8, 16])
def test_shares_of_bytes_are_even(processes: int) -> None:
    units = [Unit(int(gib * 2**30), ((0, n, True),) if n > 1 else ()) for gib, n in LLAMA_70B]
    loads = np.zeros(processes)
    for unit, way in zip(units, divided(units, processes), strict=True):
        for at in range(way.n):
            loads[way.owner(at)] += unit.nbytes / way.n
    assert math.isclose(loads.sum(), sum(unit.nbytes for unit in units))
    assert loads.max() <= 1.05 * loads.mean()


def test_a_stack_can_be_longer_than_it_has_arrays() -> None:
    """Two leading axes, of which one is made longer: the arrays are where they were."""
    shapes = {"x": (6, 3, 4, 5)}
    rules = {}
    for layer in range(3):
        for expert in range(4):
            cut = apply(Slice(2, expert, 1), bind(hf("x"), shapes))
            cut = apply(Slice(1, layer, 1), cut)
            rules[f"{layer}.{expert}"] = apply(rearrange("a 1 1 b -> b a"), cut)
    (stack,) = stacks(rules)
    assert stack.leading == (3, 4)
    x = np.arange(6 * 3 * 4 * 5, dtype=np.float32).reshape(shapes["x"])
    want = np.stack(
        [np.stack([evaluate(rules[f"{i}.{j}"], {"x": x}) for j in range(4)]) for i in range(3)]
    )
    np.testing.assert_array_equal(evaluate(stack.expr, {"x": x}), want)
    for leading in ((5, 4), (3, 6)):
        longer = stack.padded(leading)
        assert longer.shape == (*leading, 5, 6)
        np.testing.assert_array_equal(evaluate(longer, {"x": x})[:3, :4], want)


WHOLE = """
import json, sys
from pathlib import Path
from maxconv.cli.commands import start
from maxconv.cli.reports import TerminalReporter
from maxconv.execution.malloc import keep_freed
from maxconv.execution.memory import host_memory
from maxconv.jobs import export, prepare_export
from maxconv.planning.estimates import device_estimate, host_estimate

keep_freed()
prepare_export.window_of = lambda config: int(sys.argv[1])
config, write, began = start(sys.argv[3:], "export"), export._write, []

def measured(*arguments):
    began.append(host_memory())
    write(*arguments)

export._write = measured
with prepare_export.prepared(config, sys.argv[2]) as job:
    export.run(job, TerminalReporter())
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    plan, window = job.plan, job.window
    estimates = [host_estimate(plan, window, job.tree), device_estimate(plan, window)]
    stored = sum(info.nbytes for info in job.tree.tensors.values())
    largest = max(info.chunk_nbytes for info in job.tree.tensors.values())
    print(json.dumps([peak - began[0], *estimates, stored, largest, job.tree.stats.bytes_read]))
"""
LIBRARIES = 96 << 20  # bytes that compiling programs takes while it runs; measured


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_memory_is_within_the_estimates(
    scan: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a trainer saves it, in float32 and compressed: its chunks are larger than a step."""
    sizes = {"num_hidden_layers": 12, "vocab_size": 32_000, "hidden_size": 1024}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "intermediate_size": 4096}
    for name, size in {**sizes, **heads}.items():
        monkeypatch.setitem(demo.CONFIG, name, size)
    demo.write_checkpoint(model := tmp_path / "llama")
    words = [*CPU, f"--hf_model_path={model}", "--verify=none"]
    layout = [f"scan_layers={scan}", "ici_fsdp_parallelism=8", "--save_dtype=float32"]
    out = f"base_output_directory={tmp_path / 'out'}"
    convert.run(parse([*words, *layout, "--use_compression=true", out]))
    out = f"base_output_directory={tmp_path / 'back'}"
    command = [sys.executable, "-c", WHOLE, str(64 << 20), str(tmp_path / "out"), *words, out]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    grown, host, device, stored, largest, read = json.loads(done.stdout.splitlines()[-1])
    assert read == stored and largest > 8 << 20
    bound = host + device + LIBRARIES  # simulated devices have their memory in the host's
    assert grown <= bound < stored, [n >> 20 for n in (grown, host, device, stored, largest)]


@pytest.mark.slow
@pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu, the compiler, is published for Linux on x86_64 only",
)
@pytest.mark.parametrize(
    ("name", "words", "trained_on", "exported_on"),
    [
        (
            "llama3.1-70b",
            "ici_fsdp_parallelism=16 ici_tensor_parallelism=4",
            "v5p:4x4x4",
            "v5p:2x2x4",
        ),
        (
            "deepseek3-671b",
            "ici_expert_parallelism=8 ici_fsdp_parallelism=32",
            "v5p:4x8x8",
            "v5p:4x8x8",
        ),
    ],
)
def test_of_large_models_each_process_receives_its_share(
    name: str, words: str, trained_on: str, exported_on: str
) -> None:
    """A checkpoint in float32 of one slice, exported on another; nothing is executed."""
    source, config = published(name), parse([f"model_name={name}", *words.split()], {})
    model, facts = resolve(source, name, model_facts(name)), model_facts(name)
    mesh = make_mesh(config, devices(trained_on))
    leaves, _ = conversion_leaves(source, model, mesh, config.logical_axis_rules, 1, "float32")
    stored: dict[str, TensorInfo] = {}
    for leaf in leaves:
        of, chunk = leaf.name.removeprefix(ROOT), leaf.sharding.shard_shape(leaf.shape)
        stored[of] = TensorInfo(of, leaf.dtype, leaf.shape, chunk)
    tree: Any = SimpleNamespace(tensors=stored, root="tree")
    back = way_back(tree, source, name, facts)
    copied = {tensor: source.tensors[tensor].nbytes for tensor in back.copied}
    shared = shares(back.stacks, back.dtypes, copied, stored, devices(exported_on))
    plan = planned(shared, stored, STEP_MOST, WINDOW_MOST["tpu"] // 4)
    written = Counter({process: 0 for process in plan.processes})
    for tensor, nbytes in copied.items():
        written[shared.owners[tensor]] += nbytes
    for stack in back.stacks:
        for tensor in stack.names:
            written[shared.owners[tensor]] += math.prod(stack.shape) * 2
    mean = sum(written.values()) / len(written)
    assert max(written.values()) <= 1.05 * mean
    assert sum(map(plan.read_nbytes, plan.processes)) == plan.needed_nbytes
    assert max(received(plan).values()) <= 1.1 * 2 * mean  # float32, some in longer blocks
    recipes = {step.recipe: leaf.name for leaf in plan.leaves for step in leaf.steps}
    chunks = {leaf.name: stored[leaf.leaf.tensors[0]].chunk_nbytes for leaf in plan.leaves}
    assert all(recipe.cost <= 1.4 * max(chunks[n], STEP_MOST) for recipe, n in recipes.items())
    largest = max(recipes, key=lambda recipe: recipe.cost)
    assert largest.sharding.mesh.size == plan.mesh.size  # one that all processes make together
    compiled = compile_cell(largest)
    assert set(FOREIGN.findall(compiled.as_text() or "")) <= {"all-to-all"}
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * largest.device_nbytes


def received(plan: Plan) -> Counter[int]:
    """Bytes that each process is sent by others."""
    found: Counter[int] = Counter()
    for step in plan.readings:
        for reading in step.recipe.reads:
            if reading.share is None:
                continue
            for process, boxes in boxes_by_process(reading.sharding, reading.shape).items():
                own = reading.parts.get(process, ())
                kept = sum(volume(x) for a in boxes for b in own if (x := intersect(a, b)))
                found[process] += (sum(map(volume, boxes)) - kept) * reading.dtype.itemsize
    return found
