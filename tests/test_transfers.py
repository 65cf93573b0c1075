"""What crosses between the host and its devices in a conversion: what must, and once."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec
from jobs import job_words

from maxconv.config import parse
from maxconv.execution.program import Programs
from maxconv.jobs import convert
from maxconv.jobs.prepare import Job
from maxconv.planning.cells import Recipe
from maxconv.planning.placement import device_boxes
from maxconv.targets import streaming


@dataclass
class Crossed:
    """Bytes of every transfer, in order."""

    to_devices: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    """Of the arrays that a cell is called with and that are still in the host's memory."""
    to_host: dict[str, list[int]] = field(default_factory=dict)
    """By the leaf that they are part of."""
    started: list[int] = field(default_factory=list)
    """To the host, whoever asked for them."""
    taken: list[int] = field(default_factory=list)


def watch(patch: pytest.MonkeyPatch) -> Crossed:
    """Counts from now on; a program that moves more than its offset to the devices fails."""
    crossed = Crossed()
    put, cell, blank = jax.device_put, Programs.cell, Programs.blank
    to_host, moved = streaming._LazyArrayHandler._to_host, streaming._LazyArrayHandler._moved
    array = type(put(0))
    start = array.copy_to_host_async

    def device_put(x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.flags.writeable:  # else it is what a CPU device holds, seen as another dtype
            crossed.to_devices.append(x.nbytes)
        return put(x, *args, **kwargs)

    def guarded(run: Callable[..., Any], recipe: Recipe) -> Callable[..., Any]:
        everywhere = NamedSharding(recipe.sharding.mesh, PartitionSpec())

        def call(*args: Any) -> Any:
            host = [x for x in args if not isinstance(x, jax.Array)]
            crossed.offsets += [x.nbytes for x in host]
            args = tuple(x if isinstance(x, jax.Array) else put(x, everywhere) for x in args)
            with jax.transfer_guard("disallow"):
                return run(*args)

        return call

    def copy_to_host_async(self: Any) -> None:
        crossed.started.append(self.nbytes)
        start(self)

    def part_to_host(self: Any, part: Any, *args: Any) -> Any:
        before = len(crossed.taken)
        made = to_host(self, part, *args)
        crossed.to_host.setdefault(part.name, []).extend(crossed.taken[before:])
        return made

    def slice_moved(self: Any, held: Any, *args: Any) -> Any:
        crossed.taken.append(held.unsliced_data.nbytes)
        return moved(self, held, *args)

    patch.setattr(jax, "device_put", device_put)
    patch.setattr(array, "copy_to_host_async", copy_to_host_async)
    patch.setattr(Programs, "cell", lambda self, recipe: guarded(cell(self, recipe), recipe))
    patch.setattr(Programs, "blank", lambda self, recipe: guarded(blank(self, recipe), recipe))
    patch.setattr(streaming._LazyArrayHandler, "_to_host", part_to_host)
    patch.setattr(streaming._LazyArrayHandler, "_moved", slice_moved)
    return crossed


def converted(directory: Path) -> tuple[Job, Crossed]:
    """A conversion in slabs, watched."""
    case = tiny.EVEN["qwen3-30b-a3b"]
    model = tiny.write(case, directory / "hf")
    words = tiny.maxtext_words(case, True)
    words = job_words(directory, model, words, "fsdp4_tp2", ["--verify=none"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("maxconv.jobs.prepare.window_of", lambda config: 32 << 10)
        crossed = watch(patch)
        return convert.run(parse(words)), crossed


def test_all_crosses_once(tmp_path: Path) -> None:
    job, crossed = converted(tmp_path)
    plan, devices = job.plan, job.plan.mesh.devices.size
    assert any(len(leaf.slabs) > 1 for leaf in plan.leaves)

    # To the devices: what the plan gives each for each step, and where the cell goes.
    steps = [step for step in plan.steps if not step.recipe.is_whole]
    given = [read.shard_nbytes for step in plan.steps for read in step.recipe.reads]
    assert sorted(crossed.to_devices) == sorted(given * devices)
    assert sum(crossed.to_devices) <= 1.02 * plan.read_nbytes(0)  # no more than norms twice
    assert sorted(crossed.offsets) == sorted(4 * len(step.offset) for step in steps)

    # To the host: every shard of every slab, which each device holds by itself but for replicas.
    assert sorted(crossed.started) == sorted(sum(crossed.to_host.values(), []))
    for leaf in plan.leaves:
        moved = crossed.to_host[leaf.name]
        assert len(moved) == devices * len(leaf.slabs), leaf.name
        replicas = devices // len(set(device_boxes(leaf.sharding, leaf.shape).values()))
        assert sum(moved) == replicas * leaf.nbytes, leaf.name  # each is cut on the host
        assert replicas == 1 or leaf.nbytes < 0.01 * plan.output_nbytes
