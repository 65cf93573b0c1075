"""Whole conversions beside MaxText's own, Orbax' load and save, and a copy of the files.

    python tests/benchmarks/beside_maxtext.py DIR [--model qwen3-0.6b qwen3-4b] [--runs 3]
        [--maxtext PYTHON] [--settle 12]

Makes each checkpoint in DIR (published shapes, random weights) unless it is there, and runs all
sides in turn, each in a fresh process on 8 simulated devices: start to exit, from files that are
cached. Prints minimum, median and maximum of what they took, where the time of a conversion went,
and every target of `targets.py` with what came of it. `PYTHON` is what tests/maxtext/environment.sh
prints; without it MaxText is left out. DIR needs room for the largest checkpoint twice, and the
figures a machine that does nothing else.

The wall clock of maxconv is without --verify, as the others look at nothing that they wrote. Its
memory, and the time until it has the first tensor, are of a side that verifies, as it does by
default, and writes a trace: DIR/traces/MODEL.RUN.json, which ui.perfetto.dev opens.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from runs import GIB, Run, first_byte, measured, read_by_each, settled
from targets import COPY, FOUR, HEAD, MAXTEXT, ORBAX, OURS, VERIFIED, rows, spread, table

HERE = Path(__file__).parent
ENVIRON = {"JAX_PLATFORMS": "cpu"}


@dataclass(frozen=True)
class Bench:
    """One model, and where its files are."""

    model: str
    source: Path
    gib: float
    traces: Path
    out: Path
    maxtext: str | None
    """The python that has MaxText."""

    def trace(self, run: int) -> Path:
        return self.traces / f"{self.model}.{run}.json"

    @property
    def words(self) -> list[str]:
        """Those that maxconv and MaxText share."""
        words = [f"model_name={self.model}", f"--hf_model_path={self.source}", "scan_layers=true"]
        return [*words, "hardware=cpu", f"base_output_directory={self.out}"]

    @property
    def ours(self) -> list[str]:
        return [sys.executable, "-m", "maxconv.to_maxtext", *self.words, "ici_fsdp_parallelism=8"]

    def commands(self, run: int) -> Mapping[str, Sequence[str]]:
        """What each side runs."""
        source, out = str(self.source), str(self.out)
        alone = "skip_jax_distributed_system=true"
        commands = {
            OURS: [*self.ours, alone, "--verify=none"],
            COPY: ["sh", "-c", 'cp -r "$0" "$1" && sync', source, out],
            ORBAX: [sys.executable, str(HERE / "orbax_alone.py"), source, out],
            VERIFIED: [*self.ours, alone, f"--trace={self.trace(run)}"],
        }
        if self.maxtext:
            module = ["-m", "maxtext.checkpoint_conversion.to_maxtext"]
            more = ["run_name=x", "attention=dot_product"]
            commands[MAXTEXT] = [self.maxtext, *module, *self.words, alone, *more]
        return commands


def figures(bench: Bench, runs: int, settle: float) -> dict[str, dict[str, list[float]]]:
    """Every figure of every side, for `targets.rows`; says where the time of the last run went."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    where = ""
    for i in range(runs):
        for side, command in bench.commands(i).items():  # in turn: a slow minute hits all of them
            settled(bench.out, settle, bench.source)
            run = measured(command, **ENVIRON)
            print(f"{bench.model}, run {i + 1}, {side}: {run.seconds:.1f} s", file=sys.stderr)
            for name, value in _taken(run, bench.gib).items():
                found[side][name].append(value)
            if side == VERIFIED:
                found[side]["first tensor byte"].append(first_byte(bench.trace(i), run))
                where = next(line for line in run.said.splitlines() if line.startswith("time, "))
    print(f"\n{where}")
    found[FOUR]["off an even share"] = shares(bench, 4)
    return found


def shares(bench: Bench, count: int) -> list[float]:
    """By how many % what each of several processes reads differs from the mean; prints it, too."""
    settled(bench.out)
    each = read_by_each(count, [*bench.ours, "--verify=none"], **ENVIRON)
    mean = sum(each) / count
    mib = ", ".join(f"{nbytes / 2**20:.1f}" for nbytes in each)
    print(f"{count} processes read {mib} MiB: the largest is {max(each) / mean:.4f} of the mean")
    return [abs(nbytes / mean - 1) * 100 for nbytes in each]


def _taken(run: Run, gib: float) -> dict[str, float]:
    return {"wall": run.seconds, "peak memory": run.peak, "CPU per GiB": run.cpu / gib}


def sides(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """What each side took."""
    units = {"wall": "s", "peak memory": "GiB", "CPU per GiB": "s"}
    taken = {side: values for side, values in found.items() if side != FOUR}
    body = [[side, *(spread(values[name]) for name in units)] for side, values in taken.items()]
    return table(["side", *(f"{name}, {unit}" for name, unit in units.items())], body)


def checkpoint(model: str, directory: Path) -> float:
    """Makes one unless it is there; returns its GiB. By itself, as it takes memory."""
    command = [sys.executable, HERE / "checkpoints.py", model, directory]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) / GIB


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The arguments of every comparison with MaxText."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", nargs="+", default=["qwen3-0.6b"])
    parser.add_argument("--maxtext", help="python of MaxText's environment")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--settle", type=float, default=12, help="seconds of rest before each run")
    return parser


def main() -> None:
    parser = arguments(__doc__)
    args = parser.parse_args()
    traces = args.directory / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    body, peaks = list[list[str]](), dict[float, float]()
    with tempfile.TemporaryDirectory(prefix="out-", dir=args.directory) as scratch:
        for model in args.model:
            source = args.directory / model
            gib = checkpoint(model, source)
            bench = Bench(model, source, gib, traces, Path(scratch, "out"), args.maxtext)
            found = figures(bench, args.runs, args.settle)
            print(
                f"\n{model}, {gib:.2f} GiB: {args.runs} runs of each side, {args.settle:g} s apart"
            )
            print(f"\n{sides(found)}", flush=True)
            body += rows(model, gib, found)
            peaks[gib] = statistics.median(found[VERIFIED]["peak memory"])
    print(f"\n{table(HEAD, body)}")
    if len(peaks) > 1:
        growth = peaks[max(peaks)] / peaks[min(peaks)]
        grown = f"{max(peaks):.2f} GiB takes {growth:.2f} times the memory of {min(peaks):.2f} GiB"
        print(f"\nA model of {grown}, by the medians.")


if __name__ == "__main__":
    main()
