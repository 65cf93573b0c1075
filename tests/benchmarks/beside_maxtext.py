"""Time and peak memory of a whole conversion, beside MaxText's own on the same checkpoint.

    python tests/benchmarks/beside_maxtext.py DIR [--model qwen3-0.6b] [--maxtext PYTHON] [--runs 3]

Makes the checkpoint in DIR (published shapes, random weights), then runs both sides in turn, each
in a fresh process, and prints minimum, median and maximum. `PYTHON` is what
tests/maxtext/environment.sh prints; without it only maxconv runs, and a copy of the files.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import checkpoints

GIB = 2**30


def measured(command: list[str], out: Path, **environ: str) -> tuple[float, float, float]:
    """Seconds, peak GiB and CPU seconds of a process, start to exit; `out` is removed first."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    started = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env={**os.environ, **environ}
    )
    assert process.stderr is not None
    errors = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        sys.exit(f"{command[:4]} failed:\n{errors[-3000:]}")
    return seconds, usage.ru_maxrss * 1024 / GIB, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--model", default="qwen3-0.6b")
    parser.add_argument("--maxtext", help="python of MaxText's environment")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    source, out = args.directory / args.model, args.directory / "out"
    total = checkpoints.write(args.model, source)
    words = [f"model_name={args.model}", "scan_layers=true", "hardware=cpu"]
    words += ["skip_jax_distributed_system=true", f"base_output_directory={out}"]
    ours = [sys.executable, "-m", "maxconv.to_maxtext", *words, f"--hf_model_path={source}"]
    sides = {
        "maxconv": [*ours, "ici_fsdp_parallelism=8", "--verify=none"],
        "maxconv, verified": [*ours, "ici_fsdp_parallelism=8"],
        "cp and sync": ["sh", "-c", f"cp -r {source} {out} && sync"],
    }
    if args.maxtext:
        module = "maxtext.checkpoint_conversion.to_maxtext"
        sides["MaxText"] = [args.maxtext, "-m", module, *words]
        sides["MaxText"] += ["run_name=x", "attention=dot_product", f"--hf_model_path={source}"]
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
    for _ in range(args.runs):
        for side, command in sides.items():  # in turn, so that a slow minute hits all of them
            found[side].append(measured(command, out, JAX_PLATFORMS="cpu"))
    print(f"{args.model}, {total / GIB:.2f} GiB, {args.runs} runs each; min / median / max")
    for side, figures in found.items():
        seconds, peak, cpu = (
            " / ".join(f"{f:.1f}" for f in (min(x), statistics.median(x), max(x)))
            for x in zip(*figures, strict=True)
        )
        print(f"{side:18} {seconds:>22} s   peak {peak:>18} GiB   cpu {cpu:>22} s")
    if args.maxtext:
        theirs, mine = (
            [statistics.median(x) for x in zip(*found[side], strict=True)]
            for side in ("MaxText", "maxconv")
        )
        ratios = [t / m for t, m in zip(theirs, mine, strict=True)]
        print("MaxText / maxconv: time {:.1f}, peak memory {:.1f}, cpu {:.1f}".format(*ratios))
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
