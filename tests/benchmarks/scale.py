"""What conversions of large models take on slices, from their plans: no TPU, no weights.

    python tests/benchmarks/scale.py [--write]

prints a table. Bytes are those that the busiest host reads, and writes; ranges are the pieces of
files in which it reads them; a chip's memory is the most that it holds at once. The seconds are
those of the host's network at the bandwidth stated in `maxconv/tpus.py`, reading and writing at
once. `--write` puts the table into the guide.
"""

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from headers import published  # noqa: E402
from plans import make_plan  # noqa: E402

from maxconv.config import parse  # noqa: E402
from maxconv.config.mesh import make_mesh  # noqa: E402
from maxconv.config.tables import model_facts  # noqa: E402
from maxconv.jobs.memory import STEP_MOST, WINDOW_MOST, WINDOW_PART  # noqa: E402
from maxconv.models.resolve import resolve  # noqa: E402
from maxconv.planning.estimates import device_estimate, host_estimate  # noqa: E402
from maxconv.planning.plan import Plan  # noqa: E402
from maxconv.planning.tpus import Slice, slice_of  # noqa: E402
from maxconv.text import duration, size  # noqa: E402

PAGE = Path(__file__).parents[2] / "maxconv/guide/slice.md"
MODELS = ("llama3.1-70b", "llama3.1-405b", "qwen3-235b-a22b", "deepseek3-671b")
SLICES = ("v5litepod-16", "v5p-64", "v5p-512")
HEAD = (
    "| model | slice | hosts | read per host | ranges per host | host memory | chip memory "
    "| network |"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    lines = [HEAD, "|---|---|---|---|---|---|---|---|"]
    for model_name in MODELS:
        for name in SLICES:
            on = slice_of(name)
            window = min(on.machine.ram // WINDOW_PART, WINDOW_MOST["tpu"])
            lines.append(row(model_name, on, plan_of(model_name, on, window), window))
    table = "\n".join(lines)
    print(table)
    if args.write:
        text = PAGE.read_text()
        old = re.search(re.escape(HEAD) + r"(\n\|.*)+", text)
        assert old is not None, f"{PAGE} has no such table"
        PAGE.write_text(text.replace(old[0], table))


def plan_of(model_name: str, on: Slice, window: int) -> Plan:
    """The plan on a slice, fully sharded."""
    source = published(model_name)
    config = parse([f"model_name={model_name}"], {})
    model = resolve(source, model_name, model_facts(model_name))
    mesh = make_mesh(config, on.chips())
    rules, axis = config.logical_axis_rules, config.scan_axis
    return make_plan(source, model, mesh, rules, axis, "bfloat16", STEP_MOST, window // 4)


def row(model_name: str, on: Slice, plan: Plan, window: int) -> str:
    reads = [plan.read_nbytes(process) for process in plan.processes]
    busiest = reads.index(max(reads))
    ranges = sum(
        steps * round(read.nbytes_by_process.get(busiest, 0) / read.run)
        for recipe, steps in plan.recipes.items()
        for read in recipe.reads
        if read.run
    )
    moved = max(max(reads), -(-plan.output_nbytes // len(reads)))
    cells = (
        model_name,
        on.name,
        str(on.hosts),
        size(max(reads)),
        f"{ranges:,}",
        size(host_estimate(plan, window, published(model_name))),
        size(device_estimate(plan, window)),
        f"{duration(moved / on.network)} at {on.network * 8 / 1e9:.0f} Gbit/s",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
