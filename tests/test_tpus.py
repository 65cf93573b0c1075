"""Slices that are not here: their chips are those that libtpu tells of, and plans over them."""

import platform
import re
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from headers import published, write_headers
from jax.experimental import topologies
from plans import make_plan
from test_tpu_compile import plan_of

from maxconv import cli
from maxconv.config import parse
from maxconv.config.mesh import device_array, make_mesh
from maxconv.config.tables import model_facts
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.jobs.memory import STEP_MOST
from maxconv.jobs.prepare import prepared
from maxconv.models.resolve import resolve
from maxconv.planning.cells import nbytes_read
from maxconv.planning.tpus import slice_of

needs_libtpu = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu is published for Linux on x86_64 only",
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "topology"),
    [
        ("v5litepod-16", "v5e:4x4"),
        ("v5e-128", "v5e:8x16"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5p-64", "v5p:2x4x4"),
        ("v5p-256", "v5p:4x4x8"),
        ("v6e-64", "v6e:8x8"),
        ("v6e-1", "v6e:1x1"),
        ("v5litepod-4", "v5e:2x2"),
        ("v5litepod-8", "v5e:2x4"),
        ("v6e-8", "v6e:2x4"),
        ("v6e-8:ct6e-standard-4t", "v6e:2x4"),
    ],
)
def test_chips_are_those_of_libtpu(name: str, topology: str) -> None:
    def known(chips):
        return [(c.id, c.process_index, tuple(c.coords), c.device_kind) for c in chips]

    on = slice_of(name)
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, chips_per_host_bounds=on.machine.grid
    )
    ours, theirs = on.chips(), described.devices
    assert known(ours) == known(theirs)
    config = parse([f"ici_tensor_parallelism={on.shape[0]}"], {})
    meshes = [device_array(config, chips) for chips in (ours, theirs)]
    assert [c.id for c in meshes[0].flat] == [c.id for c in meshes[1].flat]


@pytest.mark.slow
@needs_libtpu
def test_a_plan_is_the_one_for_real_devices() -> None:
    words = "ici_fsdp_parallelism=8 ici_tensor_parallelism=4"
    real = plan_of("qwen3-30b-a3b", "v5p:2x4x4", words)
    config = parse(words.split(), {})
    source = published("qwen3-30b-a3b")
    mesh = make_mesh(config, slice_of("v5p-64").chips())
    model = resolve(source, "qwen3-30b-a3b", model_facts("qwen3-30b-a3b"))
    ours = make_plan(source, model, mesh, config.logical_axis_rules, config.scan_axis)
    assert [leaf.local_nbytes for leaf in ours.leaves] == [p.local_nbytes for p in real.leaves]
    assert list(map(ours.read_nbytes, range(8))) == list(map(real.read_nbytes, range(8)))


@pytest.mark.parametrize("words", ["", "ici_expert_parallelism=4", "ici_tensor_parallelism=2"])
def test_bytes_counted_at_once_are_those_of_each_step(words: str) -> None:
    name = "qwen3-30b-a3b"
    config = parse([f"model_name={name}", "num_slices=2", *words.split()], {})
    source = published(name, layers=2)
    model = resolve(source, words={"vocab_size": 151936 + 512})  # the last rows are not read
    mesh = make_mesh(config, slice_of("v5p-16").chips(2))
    plan = make_plan(source, model, mesh, config.logical_axis_rules, config.scan_axis)
    shapes = {name: info.shape for name, info in plan.tensors.items()}
    assert plan.processes == [0, 1, 2, 3]
    for process in plan.processes:
        one_by_one = sum(nbytes_read(step, shapes, process) for step in plan.readings)
        assert plan.read_nbytes(process) == one_by_one


@pytest.mark.slow
def test_many_hosts_read_whole_tensors() -> None:
    """Where each needs a little of every expert, some read all of this one and others of that."""
    name = "deepseek3-671b"
    source, config = published(name), parse([f"model_name={name}"], {})
    mesh = make_mesh(config, slice_of("v5p-512").chips())
    model = resolve(source, name, model_facts(name))
    plan = make_plan(source, model, mesh, config.logical_axis_rules, 1, budget=STEP_MOST)
    assert len(plan.processes) == 64 and dict(mesh.shape)["fsdp"] == 256
    for kernel in ("wi_0", "wi_1", "wo"):
        (leaf,) = (p for p in plan.leaves if p.name.endswith(f"MoeBlock_0.{kernel}"))
        assert len(leaf.steps) < len(leaf.leaf.tensors) // 50
        assert all(read.run > 7 << 20 for step in leaf.steps for read in step.recipe.reads)
    shares = list(map(plan.read_nbytes, plan.processes))
    assert sum(shares) == plan.needed_nbytes and max(shares) <= 1.01 * sum(shares) / 64


@pytest.mark.slow
def test_plan_on_a_laptop(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_headers(published("deepseek3-671b"), tmp_path)
    words = ["model_name=deepseek3-671b", f"--hf_model_path={tmp_path}", "--tpu_type=v5p-1024"]
    sizes = ["--num_slices=2", "ici_expert_parallelism=8"]
    page = tmp_path / "plan.html"
    assert cli.main(["plan", *words, *sizes, f"--report={page}"]) == 0
    ElementTree.fromstring(re.sub(r"<meta[^>]*>|<!doctype html>", "", page.read_text()))
    assert len(re.findall(r"<title>host \d+: ", page.read_text())) == 256
    out = capsys.readouterr().out
    assert "1024 devices, 256 processes" in out
    assert "slice    v5p-1024: 8x8x8 chips, 128 hosts; a host uses" in out
    assert "Gbit/s, if the storage keeps up" in out
    assert cli.main(["convert", *words]) == 2
    assert "--tpu_type is only valid with `maxconv plan`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "hosts", "gib", "gbits"),
    [
        ("v5litepod-1", 1, 48, 25),
        ("v5litepod-4", 1, 192, 100),
        ("v5litepod-8", 1, 384, 200),
        ("v5e-8:ct5lp-hightpu-4t", 2, 192, 100),
        ("v5litepod-16", 4, 192, 100),
        ("v6e-1", 1, 176, 100),
        ("v6e-4", 1, 720, 400),
        ("v6e-8", 1, 1440, 800),
        ("v6e-8:ct6e-standard-4t", 2, 720, 400),
        ("v6e-256", 64, 720, 400),
        ("v5p-8", 1, 448, 200),
        ("v5p-16", 2, 448, 200),
    ],
)
def test_hosts_are_those_of_googles_machine_types(name, hosts, gib, gbits) -> None:
    on = slice_of(name)
    assert (on.hosts, on.machine.ram >> 30, on.network * 8 / 1e9) == (hosts, gib, gbits)
    assert {chip.process_index for chip in on.chips()} == set(range(hosts))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p", "expected one like v5p-64"),
        ("v9-8", "Known types: v5litepod-N, v5p-N, v6e-N"),
        ("v5p-7", "v5p-N exists for N in 8, 16, 32, 64"),
        ("v5p-4", "v5p-N exists for N in 8, 16, 32, 64"),
        ("v5p-24", "512, 1024, 2048, 4096, 8192.$"),
        ("v6e-2", "v6e-N exists for N in 1, 4, 8, 16"),
        ("v6e-512", "64, 128, 256.$"),
        ("v6e-" + "9" * 5000, "expected one like v5p-64"),
        ("v6e-²", "expected one like v5p-64"),
        ("v5e-", "expected one like v5p-64"),
        (
            "v5e-8:ct6e-standard-4t",
            "machine type of v5litepod-8 is ct5lp-hightpu-4t or ct5lp-hightpu-",
        ),
        ("v5e-16:ct5lp-hightpu-8t", "machine type of v5litepod-16 is ct5lp-hightpu-4t.$"),
    ],
)
def test_no_such_slice(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        slice_of(name)
    assert f"tpu_type={name}" in str(error.value)


def test_more_slices_than_there_are() -> None:
    with pytest.raises(
        UserError, match="num_slices=100000 is too large; .* 16384 chips, which are 512 slices"
    ):
        slice_of("v5p-64").chips(100_000)


@pytest.mark.slow
@needs_libtpu
def test_the_compiler_is_asked(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_headers(published("qwen3-0.6b"), tmp_path)
    words = ["plan", "model_name=qwen3-0.6b", f"--hf_model_path={tmp_path}"]
    assert cli.main([*words, "--tpu_type=v5p-16", "--compile"]) == 0
    out = capsys.readouterr().out
    assert "all-to-all" in out and re.search(r"compiled \d+ programs for 8 chips", out)
    assert cli.main([*words, "--compile"]) == 2
    assert "--compile needs the type of slice" in capsys.readouterr().err


def test_a_part_of_a_model_that_no_disk_here_holds(tmp_path: Path) -> None:
    """Llama 3.1 405B, 756 GiB behind a real header: planned, and one slab of a leaf really made."""
    write_headers(published("llama3.1-405b"), tmp_path)
    words = ["hardware=cpu", "skip_jax_distributed_system=true", "ici_fsdp_parallelism=8"]
    words += ["model_name=llama3.1-405b", f"--hf_model_path={tmp_path}"]
    with prepared(parse(words, {}), writes=False) as job:
        leaf = next(leaf for leaf in job.plan.leaves if leaf.name.endswith("mlp.wi_0.kernel"))
        assert leaf.shape == (16384, 126, 53248) and leaf.nbytes > 200 << 30
        slab = leaf.slabs[-1]
        assert sum(slab.nbytes for slab in leaf.slabs) == leaf.nbytes
        assert slab.local_nbytes <= job.window // 4
        few = replace(job.plan, leaves=(replace(leaf, slabs=(slab,)),))
        with Engine(few, job.source, job.window) as engine:
            assert not np.asarray(engine.make_slabs([slab])[0]).any()
        assert job.source.stats.bytes_read == few.read_nbytes(0) == slab.nbytes
