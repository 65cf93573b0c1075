"""The command `maxconv`."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from maxconv import __version__
from maxconv.config import Config
from maxconv.errors import UserError, VerificationError
from maxconv.execution.malloc import keep_freed

USAGE = """\
maxconv: Hugging Face safetensors to MaxText (Orbax) checkpoints, in the layout they train in.

  maxconv convert [base.yml] key=value ... [--flag=value ...]
      Convert. The words are those of MaxText's to_maxtext, and so is the result.
        model_name=llama3.1-8b          MaxText's name; without it config.json decides
        --hf_model_path=PLACE           a directory, gs://bucket/path, or org/name on the Hugging
                                        Face Hub; without it, where model_name is published
        base_output_directory=DIR       writes DIR/0/items (default ./mt_output); also to
                                        gs://bucket/path and hf://org/name (private, or --public)
        scan_layers=true                layers stacked (default), or one by one
        ici_fsdp_parallelism=4 ici_tensor_parallelism=2 ...      the training mesh
        hardware=cpu                    on simulated devices; --simulated_cpu_devices_count=16
        --save_dtype=bfloat16           or float32
        --verify=sample                 none, sample or full: read back and compare bits
        --overwrite                     replace DIR/0
        --resume                        go on with a conversion that was cut off
  maxconv plan [the same words]
      What a conversion would do, without reading a tensor.
        --tpu_type=v5p-64 --num_slices=2     on slices that are not here
        --report=plan.html                   a page of pictures, too
        --compile                            and what the TPU compiler makes of every cell
  maxconv verify CHECKPOINT [the words of the conversion]
      Read a converted checkpoint back, recompute it from its source, compare every bit.
  maxconv inspect PATH
      What an HF or Orbax checkpoint holds: tensors, shapes, dtypes, shardings.
  maxconv families [--markdown]
      The models that can be converted.
  maxconv demo [DIR]
      Make a small checkpoint, convert it on 8 simulated devices, verify it.

Exit codes: 0 done, 2 the words or the files are wrong (nothing was written), 42 worth trying
again, 130 interrupted, 1 anything else.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    words = sys.argv[1:] if argv is None else list(argv)
    if not words or words[0] == "help" or {"-h", "--help"}.intersection(words):
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


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a program. It ends at once: Python would clear all that JAX made, for seconds."""
    keep_freed()
    try:
        code = main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on, as with `| head`
        code = 1
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def run(command: Callable[[], None]) -> int:
    """Runs something, and tells a person what went wrong; returns the exit code."""
    from maxconv.errors import failure_text
    from maxconv.processes import liveness

    for library in ("absl", "gcsfs", "google.auth._default"):
        logging.getLogger(library).addFilter(_matters)
    with liveness.leaving_at_once():
        try:
            command()
            return liveness.leave(0)
        except (UserError, VerificationError) as error:  # all processes came to it
            print(failure_text(error), file=sys.stderr)
            return liveness.leave(error.exit_code)
        except Exception as error:
            liveness.fail(error)


def _matters(record: logging.LogRecord) -> bool:
    """Keeps out tracebacks, which each thread logs but `run` tells once, and idle warnings."""
    return record.levelno >= logging.ERROR and not record.exc_info


def start(arguments: Sequence[str]) -> Config:
    """The config of a command line, with JAX started as it says, and the user told."""
    from maxconv.config import parse
    from maxconv.processes.start import initialize

    config = parse(arguments)
    notices = (*config.notices, *initialize(config))
    import jax

    if jax.process_index() == 0:
        for notice in notices:
            print(f"note: {notice}", file=sys.stderr)
    return config


def convert(arguments: Sequence[str]) -> None:
    from maxconv.jobs import convert

    config = start(arguments)
    from maxconv.cli.reports import TerminalReporter

    convert.run(config, TerminalReporter())


def plan(arguments: Sequence[str]) -> None:
    import jax

    from maxconv.cli.plan_page import plan_page
    from maxconv.cli.plan_text import compiled_text, network_text, plan_text
    from maxconv.jobs.prepare import prepared
    from maxconv.planning.tpus import slice_of

    with prepared(start(arguments), writes=False) as job:
        on = slice_of(job.config.tpu_type) if job.config.tpu_type else None
        print(plan_text(job, on) + network_text(job.plan, job.source))
        if job.config.compile:
            print(f"\n{compiled_text(job.plan)}")
        if (page := job.config.report) and jax.process_index() == 0:
            Path(page).write_text(plan_page(job, on))


def verify(arguments: Sequence[str]) -> None:
    from maxconv.cli.reports import TerminalReporter
    from maxconv.jobs import convert
    from maxconv.jobs.prepare import prepared
    from maxconv.jobs.verify import recorded_arguments, saved_items

    if not arguments or "=" in arguments[0]:
        raise UserError("Which checkpoint? Say maxconv verify CHECKPOINT.")
    saved = saved_items(arguments[0])
    config = start([*recorded_arguments(saved), *arguments[1:], "--verify=full"])
    with prepared(config, writes=False) as job:
        convert.check(job, str(saved), "full", TerminalReporter())


def inspect(words: Sequence[str]) -> None:
    from maxconv.cli.inspect import describe

    if len(words) != 1:
        raise UserError("Say maxconv inspect PATH, of one HF or Orbax checkpoint.")
    print(describe(words[0]))


def families(words: Sequence[str]) -> None:
    from maxconv.cli.family_tables import families_markdown, families_text

    if words not in ([], ["--markdown"]):
        raise UserError("Say maxconv families, or maxconv families --markdown.")
    print(families_markdown() if words else families_text())


def demo(words: Sequence[str]) -> None:
    from maxconv.cli.demo import run

    run(words[0] if words else "maxconv_demo")


COMMANDS = {
    "convert": convert,
    "plan": plan,
    "verify": verify,
    "inspect": inspect,
    "families": families,
    "demo": demo,
}
