"""Every distinct cell of every model, at full size, through the real TPU compiler.

    python tpu_cells.py [--topology v5p:4x4x4] [--mesh WORDS] [--largest N] [MODEL ...]

prints a table: how many cells a model has, how many of them no model before it had, the most that
one takes on a chip beside its arguments and its output, the share of its bound that the worst takes
(`most_beside`), how many times the bytes that it must all steps together access (and the cell that
is furthest off), and what the cells exchange between chips. Exit code 1, with the names, if one
takes more than its bound or exchanges what its plan does not announce. A model is named as its tree
in `tests/data/trees` (`gemma3-4b.unscan.mm`), perhaps with a codec of its source
(`fp8`, `mxfp4`, `int4`: `gpt-oss-20b.scan+mxfp4`). Without names, it is every tree, and packed
sources. With `--largest`, only so many leaves of a model, a row each. The mesh is one that suits
the kind of model, or that of MaxText's words. Nothing is executed, and no TPU is needed.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from headers import published, quantised  # noqa: E402
from plans import make_plan  # noqa: E402
from test_tpu_compile import (  # noqa: E402
    BUDGET,
    FOREIGN,
    SLAB,
    accessed,
    devices,
    exchanges,
    largest,
    least_accessed,
    most_beside,
)
from test_trees import TREES, model_of, words_of  # noqa: E402

from maxconv.config import parse  # noqa: E402
from maxconv.config.mesh import make_mesh  # noqa: E402
from maxconv.config.tables import known_models, model_facts  # noqa: E402
from maxconv.execution.program import compile_cell  # noqa: E402
from maxconv.models.resolve import resolve  # noqa: E402
from maxconv.planning.cells import Recipe  # noqa: E402
from maxconv.planning.plan import LeafPlan, Plan  # noqa: E402

PACKED = (
    *("deepseek3-671b.scan+fp8", "deepseek3-671b.unscan+fp8", "deepseek3.2-671b.scan+fp8"),
    *("deepseek3-671b.scan+int4", "deepseek3-671b.unscan+int4"),  # as Kimi-K2, which MaxText lacks
    *("gpt-oss-20b.scan+mxfp4", "gpt-oss-120b.scan+mxfp4", "gpt-oss-120b.unscan+mxfp4"),
)
DENSE = "ici_fsdp_parallelism={} ici_tensor_parallelism=4"
EXPERTS = "ici_fsdp_parallelism={} ici_expert_parallelism=4"


@dataclass(frozen=True)
class Measured:
    """What the compiler says of a cell.

    Attributes:
        beside: bytes on a chip beside arguments and output.
        bound: the most that they may be.
        accessed: bytes that a chip reads and writes.
        least: what it can't do without of those.
        foreign: collectives, and what else leaves the chip.
        announced: of these, those that the plan has.
    """

    beside: int
    bound: int
    accessed: int
    least: int
    foreign: frozenset[str]
    announced: frozenset[str]

    @property
    def is_fine(self) -> bool:
        return self.beside <= self.bound and self.foreign <= self.announced


def main() -> int:
    parser = argparse.ArgumentParser(description="Compiles every distinct cell for TPUs.")
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--mesh", metavar="WORDS", help="such as ici_fsdp_parallelism=64")
    parser.add_argument("--largest", type=int, metavar="N", help="leaves of each model, row by row")
    args = parser.parse_args()
    seen: dict[Recipe, Measured] = {}
    wrong: list[str] = []
    print("| model | cells | new | most beside | of its bound ", end="")
    print("| accessed / least (worst) | exchanges | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for model in args.models or everything():
        plan = plan_of(model, args.topology, args.mesh)
        rows = {model: plan.leaves}
        if args.largest:
            leaves = largest(plan, args.largest)
            rows = {f"{model} {leaf.name}": (leaf,) for leaf in leaves}
        for name, leaves in rows.items():
            wrong += compiled_row(name, leaves, seen)
    print(
        f"\n{len(seen)} distinct cells, {len(wrong)} beyond their bound or plan", *wrong, sep="\n"
    )
    return int(bool(wrong))


def compiled_row(
    name: str, leaves: Sequence[LeafPlan], seen: dict[Recipe, Measured]
) -> Iterator[str]:
    """Prints what becomes of some leaves' cells, adds them to those seen; yields what is wrong."""
    start = time.monotonic()
    first = {step.recipe: leaf.name for leaf in leaves for step in leaf.steps}
    steps = Counter(step.recipe for leaf in leaves for step in leaf.steps)
    new = [cell for cell in first if cell not in seen]
    with ThreadPoolExecutor(2) as pool:
        seen |= zip(new, pool.map(measured, new), strict=True)
    found = {cell: seen[cell] for cell in first}
    most = max(m.beside for m in found.values()) / 2**20
    share = max(m.beside / m.bound for m in found.values())
    moved = sum(n * found[cell].accessed for cell, n in steps.items())
    least = sum(n * found[cell].least for cell, n in steps.items())
    worst = max(m.accessed / m.least if m.least else math.nan for m in found.values())
    sent = Counter(kind for m in found.values() for kind in m.foreign)
    sends = ", ".join(f"{n} {kind}" for kind, n in sorted(sent.items())) or "none"
    took = f"{time.monotonic() - start:.0f}"
    ratio = f"{moved / least:.2f} ({worst:.2f})"
    row = (name, len(found), len(new), f"{most:.1f} MiB", f"{share:.0%}", ratio, sends, took)
    print("|", " | ".join(map(str, row)), "|", flush=True)
    yield from (f"{name}: {first[cell]}: {m}" for cell, m in found.items() if not m.is_fine)


def everything() -> Iterator[str]:
    for model_name in known_models():
        trees = sorted(name for name in TREES if model_of(name) == model_name)
        yield from trees or (f"{model_name}.scan", f"{model_name}.unscan")
    yield from PACKED


def plan_of(name: str, topology: str, mesh_words: str | None) -> Plan:
    """What a conversion plans, on the mesh that the kind of model takes if none is given."""
    tree, _, codec = name.partition("+")
    model_name = model_of(tree)
    facts = model_facts(model_name)
    assert facts is not None, name
    chips = len(devices(topology))
    mesh_words = mesh_words or (EXPERTS if facts["num_experts"] > 1 else DENSE).format(chips // 4)
    source = published(model_name)
    if codec:
        source = quantised(source, codec)
    model = resolve(source, model_name, facts, words_of(tree) if tree in TREES else {})
    words = [f"model_name={model_name}", *mesh_words.split(), f"scan_layers={'.scan' in tree}"]
    config = parse(words, {})
    mesh = make_mesh(config, devices(topology))
    rules, scan_axis = config.logical_axis_rules, config.scan_axis
    return make_plan(source, model, mesh, rules, scan_axis, budget=BUDGET, slab=SLAB)


def measured(recipe: Recipe) -> Measured:
    compiled = compile_cell(recipe)
    memory = compiled.memory_analysis()
    arguments = memory.argument_size_in_bytes + memory.output_size_in_bytes
    peak = memory.peak_memory_in_bytes - arguments + memory.alias_size_in_bytes
    return Measured(
        beside=max(memory.temp_size_in_bytes, peak, 0),
        bound=most_beside(recipe),
        accessed=accessed(compiled),
        least=least_accessed(recipe),
        foreign=frozenset(FOREIGN.findall(compiled.as_text())),
        announced=frozenset(exchanges(recipe)),
    )


if __name__ == "__main__":
    sys.exit(main())
