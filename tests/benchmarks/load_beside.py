"""Loading into a process, beside Orbax' own loader of safetensors and MaxText's.

    python tests/benchmarks/load_beside.py DIR [--model qwen3-0.6b qwen3-4b] [--runs 3]
        [--maxtext PYTHON] [--settle 12]

Makes each checkpoint in DIR (published shapes, random weights) unless it is there, and loads it in
turn with all sides, each in a fresh process on 8 simulated devices: start to exit, from files that
are cached. Orbax gives tensors of Hugging Face as they are, and so does maxconv beside it
(`layout="hf"`). MaxText's trainer gets ready from the files (safetensors_dynamic) and takes a first
step, with its loader and with maxconv's in its place; the memory is that of getting ready, as the
step takes more. Prints minimum, median and maximum of what they took, and
every target with what came of it. `PYTHON` is what tests/maxtext/environment.sh prints; without it
MaxText is left out. The figures need a machine that does nothing else.
"""

import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from beside_maxtext import ENVIRON, arguments, checkpoint, sides
from runs import measured, settled
from targets import HEAD, OURS, Target, rows, table

ORBAX, READY, STEP = "Orbax load", "MaxText, ready", "MaxText, first step"
WITH = " with maxconv"
FIGURES = {"wall": "s", "CPU per GiB": "s", "peak memory": "GiB"}
PAIRS = ((OURS, ORBAX, FIGURES), (READY + WITH, READY, FIGURES), (STEP + WITH, STEP, {"wall": "s"}))
TARGETS = [
    Target(of=of, unit=unit, at_most=1, side=ours, beside=theirs)
    for ours, theirs, figures in PAIRS
    for of, unit in figures.items()
]
HERE = Path(__file__).parent
TRAIN = "from absl import app; from maxtext.trainers.pre_train import train; "
TRAIN += "app.run(train.main, argv=['train', *sys.argv[1:]])"


def commands(model: str, source: Path, out: Path, maxtext: str | None) -> Mapping[str, list[str]]:
    """What each side runs."""
    program = str(HERE / "hf_loads.py")
    found = {
        OURS: [sys.executable, program, "maxconv", str(source)],
        ORBAX: [sys.executable, program, "orbax", str(source)],
    }
    if maxtext:
        words = [f"model_name={model}", f"load_parameters_path={source}", "run_name=x", "steps=1"]
        words += ["source_checkpoint_layout=safetensors_dynamic", "dataset_type=synthetic"]
        words += [f"base_output_directory={out}", "enable_checkpointing=false", "hardware=cpu"]
        words += ["per_device_batch_size=1", "max_target_length=16", "jax_cache_dir="]
        words += ["skip_jax_distributed_system=true", "attention=dot_product", "opt_type=sgd"]
        words += ["weight_dtype=bfloat16", "ici_fsdp_parallelism=8", "scan_layers=true"]
        install = "from maxconv import maxtext; maxtext.install(); "
        ready = str(HERE / "maxtext_loads.py")
        found[READY + WITH] = [maxtext, ready, "maxconv", *words]
        found[READY] = [maxtext, ready, "maxtext", *words]
        found[STEP + WITH] = [maxtext, "-c", f"import sys; {install}{TRAIN}", *words]
        found[STEP] = [maxtext, "-c", f"import sys; {TRAIN}", *words]
    return found


def figures(
    model: str, source: Path, gib: float, out: Path, maxtext: str | None, runs: int, settle: float
) -> dict[str, dict[str, Sequence[float]]]:
    """Every figure of every side, for `targets.rows`."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    eight = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    for i in range(runs):
        for side, command in commands(model, source, out, maxtext).items():
            settled(out, settle, source)
            run = measured(command, **ENVIRON, **eight)
            print(f"{model}, run {i + 1}, {side}: {run.seconds:.1f} s", file=sys.stderr)
            taken = {"wall": run.seconds, "peak memory": run.peak, "CPU per GiB": run.cpu / gib}
            for name, value in taken.items():
                found[side][name].append(value)
    return {side: dict(of) for side, of in found.items()}


def main() -> None:
    args = arguments(__doc__).parse_args()
    directory = args.directory.resolve()
    body: list[list[str]] = []
    with tempfile.TemporaryDirectory(prefix="out-", dir=directory) as scratch:
        out = Path(scratch, "out")
        for model in args.model:
            source = directory / model
            gib = checkpoint(model, source)
            found = figures(model, source, gib, out, args.maxtext, args.runs, args.settle)
            print(f"\n{model}, {gib:.2f} GiB, {args.runs} runs of each side\n\n{sides(found)}")
            body += rows(model, gib, found, [t for t in TARGETS if t.side in found])
            print(f"\n{table(HEAD, body)}", flush=True)


if __name__ == "__main__":
    main()
