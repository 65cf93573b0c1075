"""The command `maxconv`."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence

from maxconv import __version__
from maxconv.errors import UserError

USAGE = """\
maxconv: Hugging Face safetensors to MaxText (Orbax) checkpoints, in the layout they train in.

  maxconv convert [base.yml] key=value ... [--flag=value ...]
      Convert. The words are those of MaxText's to_maxtext, and so is the result.
        model_name=llama3.1-8b          MaxText's name; without it config.json decides
        --hf_model_path=DIR             the checkpoint: config.json and *.safetensors
        base_output_directory=DIR       writes DIR/0/items (default ./mt_output)
        scan_layers=true                layers stacked (default), or one by one
        ici_fsdp_parallelism=4 ici_tensor_parallelism=2 ...      the training mesh
        hardware=cpu                    on simulated devices; --simulated_cpu_devices_count=16
        --save_dtype=bfloat16           or float32
        --verify=sample                 none, sample or full: read back and compare bits
        --overwrite                     replace DIR/0
  maxconv plan [the same words]
      What a conversion would do, without reading a tensor.
  maxconv verify CHECKPOINT [the words of the conversion]
      Read a converted checkpoint back, recompute it from its source, compare every bit.
  maxconv inspect PATH
      What an HF or Orbax checkpoint holds: tensors, shapes, dtypes, shardings.
  maxconv demo [DIR]
      Make a small checkpoint, convert it on 8 simulated devices, verify it.

Exit codes: 0 done, 2 the words or the files are wrong (nothing was written), 1 anything else.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] in ("-h", "--help", "help") or "--help" in words:
        print(USAGE, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    name, *rest = words
    if name not in COMMANDS:
        print(f"maxconv: no command {name!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    return run(lambda: COMMANDS[name](rest))


def run(command: Callable[[], None]) -> int:
    """Runs something, and tells a person what went wrong; returns the exit code."""
    from maxconv.report import problems_text

    try:
        command()
        return 0
    except UserError as error:
        print(problems_text(error.problems), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("maxconv: interrupted; what was written is no checkpoint", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # reads and writes go on in threads, which a normal exit waits for
    except Exception as error:
        traceback.print_exc()
        print(f"maxconv: failed: {error}; what was written is no checkpoint", file=sys.stderr)
        sys.stderr.flush()
        os._exit(1)


def convert(words: Sequence[str]) -> None:
    from maxconv import convert as conversion

    conversion.run(started(words))


def plan(words: Sequence[str]) -> None:
    from maxconv.convert import prepared
    from maxconv.report import plan_text, size

    with prepared(started(words), writes=False) as job:
        source = job.source
        total = sum(info.nbytes for info in source.tensors.values())
        readable = f"{source.root}, {len(source.tensors)} tensors, {size(total)}"
        print(plan_text(job.plan, job.window, readable))


def verify(words: Sequence[str]) -> None:
    from maxconv.convert import verify_saved

    if not words or "=" in words[0]:
        raise UserError("Which checkpoint? Say maxconv verify CHECKPOINT.")
    verify_saved(words[0], words[1:], started)


def inspect(words: Sequence[str]) -> None:
    from maxconv.inspect import describe

    if len(words) != 1:
        raise UserError("Say maxconv inspect PATH, of one HF or Orbax checkpoint.")
    print(describe(words[0]))


def demo(words: Sequence[str]) -> None:
    from maxconv.demo import run

    run(words[0] if words else "maxconv_demo")


COMMANDS = {
    "convert": convert,
    "plan": plan,
    "verify": verify,
    "inspect": inspect,
    "demo": demo,
}


def started(words: Sequence[str]):
    """The config of a command line, with JAX started as it says and the user told."""
    from maxconv.config import parse
    from maxconv.distributed import initialize

    config = parse(words)
    for notice in (*config.notices, *initialize(config)):
        print(f"note: {notice}", file=sys.stderr)
    return config


if __name__ == "__main__":
    sys.exit(main())
