"""Every distinct cell of every model, at full size, through the real TPU compiler.

    python tpu_cells.py [--topology v5p:4x4x4] [MODEL ...]

prints a table: how many cells a model has, how many of them no model before it had, the most that
one takes on a chip beside its arguments and its output, and how that compares with the cell itself;
cells that exchange data between chips are named. `+fp8` and `+mxfp4` are the files that DeepSeek
and OpenAI publish. Nothing is executed, and no TPU is needed.
"""

import argparse
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from headers import HeaderSource, published, quantised  # noqa: E402
from test_tpu_compile import FOREIGN, devices, names  # noqa: E402

from maxconv.algebra import volume  # noqa: E402
from maxconv.cells import Recipe  # noqa: E402
from maxconv.config import parse  # noqa: E402
from maxconv.model import resolve  # noqa: E402
from maxconv.plan import Plan, make_plan  # noqa: E402
from maxconv.program import compile_cell  # noqa: E402
from maxconv.sharding import make_mesh  # noqa: E402
from maxconv.tables import known_models, model_facts  # noqa: E402

PACKED = ("deepseek3-671b+fp8", "gpt-oss-120b+mxfp4")
DENSE = "ici_fsdp_parallelism={} ici_tensor_parallelism=4"
EXPERTS = "ici_fsdp_parallelism={} ici_expert_parallelism=4"


def main() -> None:
    parser = argparse.ArgumentParser(description="Compiles every distinct cell for TPUs.")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--topology", default="v5p:4x4x4")
    args = parser.parse_args()
    seen: dict[Recipe, tuple[int, float, set[str]]] = {}
    print("| model | cells | new | most beside | of the cell | exchanging |")
    print("|---|---|---|---|---|---|")
    for name in args.models or [*known_models(), *PACKED]:
        cells = names(plan_of(name, args.topology))
        new = [cell for cell in cells if cell not in seen]
        with ThreadPoolExecutor(2) as pool:
            seen |= zip(new, pool.map(measured, new), strict=True)
        found = {leaf: seen[cell] for cell, leaf in cells.items()}
        most = max(nbytes for nbytes, _, _ in found.values()) / 2**20
        ratio = max((r for nbytes, r, _ in found.values() if nbytes > 2**20), default=0)
        sends = ", ".join(leaf for leaf, (_, _, foreign) in found.items() if foreign) or "none"
        print(f"| {name} | {len(cells)} | {len(new)} | {most:.1f} MiB | {ratio:.1f} | {sends} |")
        sys.stdout.flush()


def plan_of(name: str, topology: str) -> Plan:
    """A model's plan with its layers as MaxText has them by default."""
    model_name, _, packed = name.partition("+")
    facts = model_facts(model_name)
    assert facts is not None
    chips = len(devices(topology))
    mesh_words = (EXPERTS if facts["num_experts"] > 1 else DENSE).format(chips // 4)
    source: HeaderSource = published(model_name)
    if packed:
        source = quantised(source)
    model = resolve(source, model_name, facts)
    words = [f"model_name={model_name}", *mesh_words.split()]
    config = parse([*words, f"scan_layers={model.family.scans}"], {})
    mesh = make_mesh(config, devices(topology))
    return make_plan(source, model, mesh, config.logical_axis_rules, config.scan_axis)


def measured(recipe: Recipe) -> tuple[int, float, set[str]]:
    """Bytes beside arguments and output, those by the bytes of the cell, and exchanges."""
    compiled = compile_cell(recipe)
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = memory.peak_memory_in_bytes - arguments + memory.alias_size_in_bytes
    beside = max(memory.temp_size_in_bytes, peak, 0)
    shard = math.prod(recipe.sharding.shard_shape(recipe.shape)) * recipe.dtype.itemsize
    lanes = 1 if recipe.lanes is None else recipe.reads[0].shape[0]
    cell = max(1, shard * lanes * volume(recipe.box) // math.prod(recipe.shape))
    return beside, beside / cell, set(FOREIGN.findall(compiled.as_text()))


if __name__ == "__main__":
    main()
