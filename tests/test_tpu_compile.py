"""Cells of whole models, compiled for real TPUs: their compiler needs none. Nothing is executed."""

import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from headers import published, quantised
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding, PartitionSpec
from plans import is_local, make_plan

from maxconv.config import parse
from maxconv.config.mesh import make_mesh
from maxconv.config.tables import model_facts
from maxconv.execution.program import bits, cell_function, compile_blank, compile_cell
from maxconv.jobs.memory import STEP_MOST, WINDOW_MOST
from maxconv.models.resolve import resolve
from maxconv.planning.cells import Recipe, nbytes_read
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.planning.redistribution import CellRead

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"),
    reason="libtpu, the compiler, is published for Linux on x86_64 only",
)

MIB = 1 << 20
# What a conversion plans with on hosts of these TPUs, each of which has the largest window.
BUDGET, SLAB = STEP_MOST, WINDOW_MOST["tpu"] // 4
# Numbers in an item of a quantised weight as it is stored: MXFP4, int4, fp8.
PACKED = {np.dtype(np.uint8): 2, np.dtype(np.int32): 8, np.dtype(ml_dtypes.float8_e4m3fn): 1}
FSDP_8 = "ici_fsdp_parallelism=8"
FSDP_4 = "ici_fsdp_parallelism=4 ici_tensor_parallelism=2"
FSDP_16 = "ici_fsdp_parallelism=16 ici_tensor_parallelism=4"
EXPERT_4 = "ici_expert_parallelism=4 ici_fsdp_parallelism=2"  # an expert in each lane
FSDP_256 = "ici_fsdp_parallelism=256"
FSDP_512 = "ici_fsdp_parallelism=512"
FSDP_64 = "ici_fsdp_parallelism=64 ici_tensor_parallelism=8"
FSDP_TENSOR_16 = "ici_fsdp_parallelism=16 ici_tensor_parallelism=16"
EXPERT_8 = "ici_fsdp_parallelism=64 ici_expert_parallelism=8"
REPLICAS = "ici_data_parallelism=4 ici_fsdp_parallelism=2"
TENSOR_8 = "ici_fsdp_parallelism=1 ici_tensor_parallelism=8"  # of 28 and 4 heads: replicated

# What moves data to another chip or to the host, or hides what it does. Three of the calls do not:
# what they crop is padding of a tile, what they assume is that our indices are right, and what
# they join is what slices of one array have copied to the chip's own memory.
FOREIGN = re.compile(
    r" ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter"
    r"|collective-(?:permute|broadcast)|send|recv|infeed|outfeed"
    r"|custom-call(?!.*(?:ZeroCrop|AssumeGatherIndicesInBound|ConcatBitcast)))(?:-start)?\("
)


@pytest.fixture(autouse=True, scope="module")
def uncached() -> Iterator[None]:
    """The cache of compiled programs cannot read those of a TPU that is not here."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def slow(*arguments: Any) -> Any:
    """A model that its compiler takes long for."""
    return pytest.param(*arguments, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("model_name", "topology", "words"),
    [
        ("llama3.1-8b", "v5e:2x4", FSDP_8),
        slow("llama3.1-8b", "v5e:2x4", FSDP_4),
        slow("llama3.1-8b", "v5p:4x4x4", FSDP_16),
        slow("llama3.1-8b", "v5e:2x4", f"{FSDP_4} scan_layers=false"),
        slow("qwen3-32b", "v5p:4x4x4", FSDP_16),
        slow("qwen2.5-7b", "v5e:2x4", TENSOR_8),
        slow("qwen3-0.6b", "v5e:16x16", ""),
        slow("qwen3-30b-a3b", "v5e:2x4", EXPERT_4),
        slow("qwen3-0.6b", "v5e:2x4", REPLICAS),
        slow("llama3.1-405b", "v5e:16x16", FSDP_TENSOR_16),
        slow("llama3.1-405b", "v5p:8x8x8", FSDP_64),
        slow("deepseek3-671b", "v5p:8x8x8", EXPERT_8),
        slow("llama2-7b", "v5e:2x4", FSDP_4),
        slow("llama4-17b-128e", "v5p:4x4x4", FSDP_16),
        slow("qwen3-235b-a22b", "v5p:4x8x8", FSDP_256),  # many cells in a step
    ],
)
def test_cells_exchange_what_they_must_and_no_more(
    model_name: str, topology: str, words: str
) -> None:
    plan = plan_of(model_name, topology, words)
    reads = [plan.read_nbytes(process) for process in plan.processes]
    assert sum(reads) == plan.needed_nbytes
    assert max(reads) * len(reads) <= 1.05 * sum(reads)
    converting: set[str] = set()
    recipes = names(plan)
    with ThreadPoolExecutor(2) as pool:
        cells = list(pool.map(compile_cell, recipes))
    for (recipe, name), compiled in zip(recipes.items(), cells, strict=True):
        check_memory(name, recipe, compiled.memory_analysis())
        text = compiled.as_text() or ""
        assert is_local(recipe) and set(FOREIGN.findall(text)) <= exchanges(recipe), name
        if re.search(r" = f32\S* convert\(", text):
            converting.add(name.split(".")[-2])
    for blank in plan.blanks:
        compiled = compile_blank(*blank)
        assert compiled.memory_analysis().temp_size_in_bytes <= MIB, blank
        assert not FOREIGN.findall(compiled.as_text()), blank
    # Bytes that are only moved are never widened, not even to be written: NaNs stay as they are.
    scales = model_name.startswith(("llama2", "llama3"))
    assert converting == ({"query"} if scales else set())


@pytest.mark.parametrize(
    ("model_name", "codec"),
    [slow("qwen3-8b", "fp8"), slow("qwen3-8b", "int4"), slow("gpt-oss-20b", "mxfp4")],
)
def test_packed_weights_are_unpacked_within_their_bound(model_name: str, codec: str) -> None:
    plan = plan_of(model_name, "v5e:2x4", FSDP_8, codec)
    packed = {
        recipe: name
        for recipe, name in names(plan).items()
        if any(read.dtype in PACKED for read in recipe.reads)
    }
    assert packed
    with ThreadPoolExecutor(2) as pool:
        cells = list(pool.map(compile_cell, packed))
    for (recipe, name), compiled in zip(packed.items(), cells, strict=True):
        check_memory(name, recipe, compiled.memory_analysis())
        assert set(FOREIGN.findall(compiled.as_text())) <= exchanges(recipe), name


@pytest.mark.parametrize(
    ("model_name", "n", "words"),
    [
        slow("llama3.1-405b", 5, FSDP_512),
        ("llama3.1-405b", 5, FSDP_64),
        slow("deepseek3-671b", 3, FSDP_512),
        slow("deepseek3-671b", 3, EXPERT_8),
    ],
)
def test_the_largest_leaves_take_few_passes_over_memory(
    model_name: str, n: int, words: str
) -> None:
    plan = plan_of(model_name, "v5p:8x8x8", words, budget=BUDGET, slab=SLAB)
    leaves = largest(plan, n)
    assert sum(leaf.nbytes for leaf in leaves) > 0.97 * plan.output_nbytes
    recipes = {step.recipe: leaf for leaf in leaves for step in leaf.steps}
    with ThreadPoolExecutor(2) as pool:
        cells = list(pool.map(compile_cell, recipes))
    for (recipe, leaf), compiled in zip(recipes.items(), cells, strict=True):
        memory = compiled.memory_analysis()
        check_memory(leaf.name, recipe, memory)
        assert memory.temp_size_in_bytes <= 5 * cell_nbytes(recipe), leaf.name
        text = compiled.as_text() or ""
        assert set(FOREIGN.findall(text)) <= exchanges(recipe), leaf.name
        assert recipe.is_whole or not copies(recipe, text), leaf.name
        assert least_accessed(recipe) <= accessed(compiled) <= most_accessed(recipe), leaf.name


def test_a_copy_of_a_slab_would_be_seen() -> None:
    plan = plan_of("llama3.1-405b", "v5p:8x8x8", FSDP_64, budget=BUDGET, slab=SLAB)
    (leaf,) = largest(plan, 1)
    recipe, slab = leaf.steps[0].recipe, leaf.slabs[0]
    (read,) = recipe.reads
    shape, sharding = read.as_read
    arguments = [
        jax.ShapeDtypeStruct(recipe.shape, recipe.dtype, sharding=recipe.sharding),
        jax.ShapeDtypeStruct((len(recipe.shape),), np.int32),
        jax.ShapeDtypeStruct(shape, bits(read.dtype), sharding=sharding),
    ]
    kept = jax.jit(cell_function(recipe), out_shardings=recipe.sharding)  # nothing is donated
    compiled = kept.lower(*arguments).compile()
    assert copies(recipe, compiled.as_text())
    assert accessed(compiled) > max(2 * slab.shard_nbytes, most_accessed(recipe))


def largest(plan: Plan, n: int) -> Sequence[LeafPlan]:
    """The `n` largest leaves, the largest first."""
    return sorted(plan.leaves, key=lambda leaf: -leaf.nbytes)[:n]


def copies(recipe: Recipe, text: str | None) -> list[str]:
    """The ops of a compiled cell that copy all of the slab that it is written into."""
    shard = ",".join(map(str, recipe.sharding.shard_shape(recipe.shape)))
    return re.findall(rf" = \w+\[{shard}\]\S* copy(?:-start)?\(.*", text or "")


def accessed(compiled: Any) -> int:
    """Bytes that a cell reads and writes in a chip's memory, as the compiler counts them.

    It adds up what each op reads and what it writes, whole tiles with their padding, also where
    they stay on the chip. Of the slab that the cell goes into it counts what is written, unless the
    slab is copied: then all of it, twice.
    """
    return int(compiled.cost_analysis()["bytes accessed"])


def least_accessed(recipe: Recipe) -> int:
    """Bytes that it can't do without, unpadded.

    What a chip is given is read once, what comes of an exchange is written and read once, the cell
    is written once.
    """
    given = sum(read.shard_nbytes for read in recipe.reads)
    exchanged = sum(read.needed_nbytes for read in recipe.reads if read.share)
    return given + 2 * exchanged + cell_nbytes(recipe)


def most_accessed(recipe: Recipe) -> int:
    """Bytes that a cell of a large leaf may access.

    Without an exchange five times the least: it is transposed and written in passes of their own,
    14 rows take the room of 16, or of 128. With one, it is laid out for it and turned back in two
    passes each, then made as without: 3 to 3.5 times the least in full tiles, but up to seven where
    a chip needs 14 or 32 columns, which take the room of 128.
    """
    return (7 if exchanges(recipe) else 5) * least_accessed(recipe)


def exchanges(recipe: Recipe) -> set[str]:
    """The collectives that a recipe may have: XLA gathers small arrays by an all-reduce."""
    shares = [read.share for read in recipe.reads if read.share]
    return {
        *(["all-to-all"] if any(share.moves for share in shares) else []),
        *(["all-gather", "all-reduce"] if any(share.copies for share in shares) else []),
    }


def test_an_exchange_would_be_seen() -> None:
    plan = plan_of("qwen3-0.6b", "v5e:2x4", FSDP_4)
    recipe = next(r for r, name in names(plan).items() if name.endswith("query.kernel"))
    (read,) = recipe.reads
    lanes = [None] * read.has_lanes
    rows = NamedSharding(plan.mesh, PartitionSpec(*lanes, ("tensor", "fsdp")))
    elsewhere = replace(recipe, reads=(replace(read, sharding=rows, share=None),))
    assert FOREIGN.findall(compile_cell(elsewhere).as_text())


def test_a_process_reads_what_its_chips_hold() -> None:
    """The devices of a topology are in no backend, but a plan knows whose they are."""
    plan = plan_of("llama3.1-8b", "v5p:4x4x4", FSDP_16)
    assert plan.processes == list(range(16))
    shapes = {name: info.shape for name, info in plan.tensors.items()}
    for leaf in plan.leaves:
        assert leaf.local_nbytes == 4 * leaf.shard_nbytes
        for step in leaf.steps:
            nbytes = [nbytes_read(step, shapes, process) for process in plan.processes]
            assert set(nbytes) == {step.recipe.buffer_nbytes}


def check_memory(name: str, recipe: Recipe, memory: Any) -> None:
    """A cell goes into its leaf in place, and takes little beside it, whatever the leaf's size."""
    shard = math.prod(recipe.sharding.shard_shape(recipe.shape)) * recipe.dtype.itemsize
    alias, output = memory.alias_size_in_bytes, memory.output_size_in_bytes
    assert shard <= output <= 1.5 * shard + MIB, name  # a TPU pads axes to whole tiles
    assert alias == (0 if recipe.is_whole else output), name
    # In HBM (temp) or on the chip (peak): both count.
    arguments_and_output = memory.argument_size_in_bytes + output - alias
    beside = max(memory.temp_size_in_bytes, memory.peak_memory_in_bytes - arguments_and_output)
    assert beside <= most_beside(recipe), name
    assert memory.host_temp_size_in_bytes == memory.host_output_size_in_bytes == 0, name


def most_beside(recipe: Recipe) -> int:
    """The bytes that a cell may take on a chip beside what it is given and its leaf."""
    cell = cell_nbytes(recipe)
    packed = [read for read in recipe.reads if read.dtype in PACKED]
    if packed:  # all that is read, in float32, some times over
        return 8 * max(cell, *map(unpacked_nbytes, packed)) + 4 * MIB
    if exchanges(recipe):  # what was exchanged, in tiles of 128 columns, on its way
        return 6 * max(cell, *map(tiled_nbytes, recipe.reads)) + 4 * MIB
    # A transposed cell, and that same cell again in the tiles of its leaf, with its layer axis
    # of size 1 padded to 2 and others to whole tiles.
    return 4 * cell + MIB


def cell_nbytes(recipe: Recipe) -> int:
    """Bytes that a cell makes on a chip."""
    shard = math.prod(recipe.sharding.shard_shape(recipe.shape)) * recipe.dtype.itemsize
    return shard * recipe.size // math.prod(recipe.shape)


def unpacked_nbytes(read: CellRead) -> int:
    """Bytes of the numbers that a device's part of a read stands for, in float32, in tiles."""
    *rows, columns = read.sharding.shard_shape(read.shape)
    if read.dtype == np.uint8:  # blocks of one axis
        columns *= rows.pop()
    return math.prod(rows) * -(-columns * PACKED[read.dtype] // 128) * 128 * 4


def tiled_nbytes(read: CellRead) -> int:
    """Bytes of a device's part of a read, its last axis padded to whole tiles of 128."""
    *rows, columns = read.sharding.shard_shape(read.shape)
    return math.prod(rows) * -(-columns // 128) * 128 * read.dtype.itemsize


def names(plan: Plan) -> dict[Recipe, str]:
    """Every recipe, with the name of a leaf that it makes."""
    return {step.recipe: leaf.name for leaf in plan.leaves for step in leaf.steps}


def plan_of(
    model_name: str,
    topology: str,
    words: str,
    codec: str | None = None,
    budget: int = 64 << 20,
    slab: float = math.inf,
) -> Plan:
    config = parse([f"model_name={model_name}", *words.split()], {})
    source = published(model_name)
    if codec is not None:
        source = quantised(source, codec)
    model = resolve(source, model_name, model_facts(model_name))
    mesh = make_mesh(config, devices(topology))
    rules, scan_axis = config.logical_axis_rules, config.scan_axis
    return make_plan(source, model, mesh, rules, scan_axis, budget=budget, slab=slab)


@cache
def devices(topology: str) -> Sequence[Any]:
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would look for the metadata of a cloud VM
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # it would lock out all other processes
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
