"""Compiles a plan's programs with the TPU compiler: `maxconv plan --tpu_type=... --compile`.

libtpu contains the real compiler, which needs no TPU. Nothing is executed.
"""

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from maxconv.errors import UserError
from maxconv.execution.program import compile_cell
from maxconv.planning.cells import Recipe
from maxconv.planning.plan import Plan
from maxconv.planning.tpus import Slice

_GENERATIONS = {"v5litepod": "v5e"}  # as libtpu calls them
_COLLECTIVE = re.compile(
    r" ((?:ragged-)?all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute|send|recv)"
    r"(?:-start)?\("
)


@dataclass(frozen=True)
class Compiled:
    """A compiled program: bytes per chip of arguments and output, of temporaries; collectives."""

    arguments: int
    temporaries: int
    collectives: tuple[str, ...]


def chips(on: Slice, num_slices: int) -> Sequence[Any]:
    """Devices of slices to compile for with libtpu; no TPU is needed.

    Raises:
        UserError: libtpu is not installed, or does not know the type of slice.
    """
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there may be no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # else it locks libtpu
    kind = on.name.partition("-")[0]
    name = f"{_GENERATIONS.get(kind, kind)}:{'x'.join(map(str, on.shape))}"
    try:
        return topologies.get_topology_desc(
            platform="tpu",
            topology_name=name,
            num_slices=num_slices,
            chips_per_host_bounds=on.machine.grid,
        ).devices
    except Exception as error:  # the plugin is missing, or does not know the name
        why = str(error).partition("\n")[0]
        raise UserError(
            f"--compile needs libtpu with support for {name} ({why}); pip install 'maxconv[tpu]' "
            "on Linux, or remove --compile."
        ) from None


def compile_all(plan: Plan) -> dict[Recipe, Compiled]:
    """Compiles every distinct recipe of a plan over `chips`."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        recipes = [recipe for recipe in plan.recipes if not recipe.is_read]
        return dict(zip(recipes, pool.map(_compiled, recipes), strict=True))


def _compiled(recipe: Recipe) -> Compiled:
    compiled = compile_cell(recipe)
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    found = dict.fromkeys(_COLLECTIVE.findall(compiled.as_text()))
    return Compiled(held, memory.temp_size_in_bytes, tuple(found))
