"""Whole exports beside MaxText's own exporter, and a copy of the files.

    python tests/benchmarks/export_beside_maxtext.py DIR [--model qwen3-0.6b qwen3-4b] [--runs 3]
        [--maxtext PYTHON] [--settle 12] [--trained]

Makes each model in DIR (published shapes, random weights) unless it is there, converts it on 8
simulated devices, and exports that, all sides in turn, each in a fresh process: start to exit, from
files that are cached. The copy is of the files of the model, which are those that come back. Prints
minimum, median and maximum of what they took, and every target with what came of it. `PYTHON` is
what tests/maxtext/environment.sh prints: MaxText's exporter needs no torch. Without it MaxText is
left out. DIR needs room for the largest checkpoint four times, and the figures a machine that does
nothing else.

With `--trained` the checkpoint is as a trainer saves it: float32 and compressed. All sides write
bfloat16.
"""

import json
import math
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from beside_maxtext import ENVIRON, arguments, checkpoint, sides
from runs import measured, settled
from targets import COPY, HEAD, LARGE, MAXTEXT, OURS, VERIFIED, Target, rows, table

TARGETS = (
    Target(of="wall", unit="s", at_most=Fraction(1, 3), beside=MAXTEXT),
    Target(of="wall", unit="s", at_most=1.5, beside=COPY, models=(LARGE, math.inf)),
    Target(of="CPU per GiB", unit="s", at_most=Fraction(1, 3), beside=MAXTEXT),
    Target(of="peak memory", unit="GiB", at_most=2, side=VERIFIED, counts=max),
)
# MaxText's exporter wants a tokenizer; what is in it does not matter.
TOKENIZER = {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}


@dataclass(frozen=True)
class Bench:
    """One model, and where its files are; `maxtext` is the python that has MaxText."""

    model: str
    source: Path
    saved: Path
    tokenizer: Path
    out: Path
    maxtext: str | None

    @property
    def words(self) -> list[str]:
        """Those that maxconv and MaxText share."""
        words = [f"model_name={self.model}", "scan_layers=true", "hardware=cpu"]
        words += [f"load_parameters_path={self.saved}/0/items", "weight_dtype=bfloat16"]
        return [*words, f"base_output_directory={self.out}", "skip_jax_distributed_system=true"]

    @property
    def commands(self) -> Mapping[str, Sequence[str]]:
        """What each side runs."""
        ours = [sys.executable, "-m", "maxconv.to_huggingface", *self.words]
        ours.append(f"--hf_model_path={self.source}")
        commands = {
            OURS: [*ours, "--verify=none"],
            COPY: ["sh", "-c", 'cp -r "$0" "$1" && sync', str(self.source), str(self.out)],
            VERIFIED: ours,
        }
        if self.maxtext:
            theirs = [self.maxtext, "-m", "maxtext.checkpoint_conversion.to_huggingface"]
            more = ["run_name=x", "attention=dot_product", f"--hf_model_path={self.tokenizer}"]
            commands[MAXTEXT] = [*theirs, *self.words, *more]
        return commands


def figures(
    bench: Bench, gib: float, runs: int, settle: float
) -> dict[str, dict[str, list[float]]]:
    """Every figure of every side, for `targets.rows`."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for i in range(runs):
        for side, command in bench.commands.items():  # in turn: a slow minute hits all of them
            settled(bench.out, settle, bench.source if side == COPY else None)
            run = measured(command, **ENVIRON)
            print(f"{bench.model}, run {i + 1}, {side}: {run.seconds:.1f} s", file=sys.stderr)
            taken = {"wall": run.seconds, "peak memory": run.peak, "CPU per GiB": run.cpu / gib}
            for name, value in taken.items():
                found[side][name].append(value)
    return found


def converted(model: str, source: Path, saved: Path, trained: bool) -> None:
    """The checkpoint to export, unless it is there."""
    if (saved / "0" / "items").exists():
        return
    words = [f"model_name={model}", f"--hf_model_path={source}", "scan_layers=true", "hardware=cpu"]
    words += [f"base_output_directory={saved}", "ici_fsdp_parallelism=8", "--verify=none"]
    words += ["skip_jax_distributed_system=true", "--overwrite"]
    words += ["--save_dtype=float32", "--use_compression=true"] if trained else []
    measured([sys.executable, "-m", "maxconv.to_maxtext", *words], **ENVIRON)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trained", action="store_true", help="float32, compressed")
    args = parser.parse_args()
    directory = args.directory.resolve()
    tokenizer = directory / "tokenizer"
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(kind))
    body, peaks = list[list[str]](), dict[float, float]()
    with tempfile.TemporaryDirectory(prefix="out-", dir=directory) as scratch:
        for model in args.model:
            source = directory / model
            saved = directory / f"{model}-{'trained' if args.trained else 'converted'}"
            gib = checkpoint(model, source)
            converted(model, source, saved, args.trained)
            bench = Bench(model, source, saved, tokenizer, Path(scratch, "out"), args.maxtext)
            found = figures(bench, gib, args.runs, args.settle)
            print(f"\n{model}, {gib:.2f} GiB, {args.runs} runs of each side\n\n{sides(found)}")
            body += rows(model, gib, found, TARGETS)
            peaks[gib] = statistics.median(found[VERIFIED]["peak memory"])
            print(f"\n{table(HEAD, body)}", flush=True)
    if len(peaks) > 1:
        growth = peaks[max(peaks)] / peaks[min(peaks)]
        grown = f"{max(peaks):.2f} GiB takes {growth:.2f} times the memory of {min(peaks):.2f} GiB"
        print(f"\nA model of {grown}, by the medians.")


if __name__ == "__main__":
    main()
