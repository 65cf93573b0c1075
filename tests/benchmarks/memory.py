"""Peak memory of whole conversions, which should not depend on the size of the model.

    python tests/benchmarks/memory.py DIR [--window_mb 512]

converts models of about 1, 4 and 16 GiB, and one whose embedding alone takes 4 GiB, each in a fresh
process and with the same window, and prints the most that the process held. The files are holes
behind real headers, so DIR needs room for the output alone: 16 GiB. With --verify, as by default,
a sample is read back.
"""

import argparse
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from runs import measured, settled

sys.path.insert(0, str(Path(__file__).parents[1]))
from headers import HeaderSource, published, write_headers  # noqa: E402

from maxconv.jobs.memory import BASE  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--window_mb", type=int, default=512)
    parser.add_argument("--verify", default="sample")
    args = parser.parse_args()
    sources = {
        "qwen3-0.6b": published("qwen3-0.6b"),
        "qwen3-1.7b": published("qwen3-1.7b"),
        "qwen3-8b": published("qwen3-8b"),
        "one leaf of 4 GiB": one_large(),
    }
    print(f"window {args.window_mb} MiB, --verify={args.verify}")
    print("| model | GiB | seconds | peak MiB |\n|---|---|---|---|")
    out = args.directory / "out"
    for name, source in sources.items():
        files = args.directory / name.replace(" ", "-")
        write_headers(source, files)
        total = sum(info.nbytes for info in source.tensors.values()) / 2**30
        words = [f"--hf_model_path={files}", f"base_output_directory={out}", "hardware=cpu"]
        words += ["ici_fsdp_parallelism=8", "skip_jax_distributed_system=true"]
        words += [f"--max_host_memory_gb={(BASE + (args.window_mb << 20)) / 2**30}"]
        command = [sys.executable, "-m", "maxconv.to_maxtext", *words, f"--verify={args.verify}"]
        settled(out)
        run = measured(command, JAX_PLATFORMS="cpu")
        print(f"| {name} | {total:.1f} | {run.seconds:.0f} | {run.peak * 1024:.0f} |", flush=True)
        shutil.rmtree(files)
        os.sync()
    shutil.rmtree(out, ignore_errors=True)


def one_large() -> HeaderSource:
    """A Llama of one layer and 2**18 tokens of 8192 dimensions."""
    source = published("llama3.1-70b", layers=1)
    vocab = 1 << 18
    tensors = [
        replace(info, shape=(vocab, *info.shape[1:])) if info.shape[0] == 128256 else info
        for name, info in source.tensors.items()
        if name != "lm_head.weight"
    ]
    config = source.config | {"vocab_size": vocab, "tie_word_embeddings": True}
    return HeaderSource("one large leaf", config, tensors)


if __name__ == "__main__":
    main()
