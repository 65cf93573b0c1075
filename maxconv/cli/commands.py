"""The command `maxconv`."""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from maxconv import __version__
from maxconv.cli.output import guard_outputs
from maxconv.errors import UserError, VerificationError
from maxconv.execution.malloc import keep_freed
from maxconv.text import note, say

if TYPE_CHECKING:  # takes longer to import than some commands to run
    from maxconv.config import Config
    from maxconv.jobs.prepare import Job
    from maxconv.planning.tpus import Slice


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        show_help([])
        return 0 if arguments else 2
    if arguments[0] == "--version":
        say(__version__)
        return 0
    name, *rest = arguments
    if name in COMMANDS and {"-h", "--help"}.intersection(rest):
        from maxconv.cli.help import command_help

        say(command_help(name))
        return 0
    if name not in COMMANDS:
        say(f"maxconv: no command {name!r}; commands are {', '.join(COMMANDS)}", sys.stderr)
        return 2
    return run(lambda: COMMANDS[name](_with_flagfiles(rest)), rest if name in _TOGETHER else None)


def _with_flagfiles(arguments: Sequence[str]) -> list[str]:
    """The arguments, with those of each --flagfile=FILE in its place, as absl has it."""
    if not any(argument.startswith("--flagfile") for argument in arguments):
        return list(arguments)
    from absl import flags

    try:
        return flags.FlagValues().read_flags_from_files(arguments, force_gnu=True)
    except (flags.Error, OSError, UnicodeDecodeError) as error:
        raise UserError(f"--flagfile cannot be read: {error}.") from None


def script(argv: Sequence[str] | None = None) -> NoReturn:
    """`main` as a program. It ends at once: Python would clear all that JAX made, for seconds."""
    keep_freed()
    guard_outputs()
    code = main(argv)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def run(command: Callable[[], None], arguments: Sequence[str] | None = None) -> int:
    """Runs something, and tells a person what went wrong; returns the exit code.

    `arguments`: of a command that several processes run together, in which they find each other.
    """
    from maxconv.errors import failure_text
    from maxconv.processes import liveness

    for library in ("absl", "gcsfs", "google.auth._default"):
        logging.getLogger(library).addFilter(_matters)
    with liveness.leaving_at_once():
        try:
            command()
            return liveness.leave(0)
        except (UserError, VerificationError) as error:  # all processes came to it
            say(failure_text(error), sys.stderr)
            _tell_the_others(arguments, error)
            return liveness.leave(error.exit_code)
        except Exception as error:
            _tell_the_others(arguments, error)
            liveness.fail(error)


def _tell_the_others(arguments: Sequence[str] | None, error: Exception) -> None:
    """Has the processes that wait for this one end with it, if it fails before they have met."""
    if arguments is not None:
        from maxconv.processes.start import refuse

        refuse(arguments, error)


def _matters(record: logging.LogRecord) -> bool:
    """Keeps out tracebacks, which each thread logs but `run` tells once, and idle warnings."""
    return record.levelno >= logging.ERROR and not record.exc_info


def start(arguments: Sequence[str], command: str = "convert") -> "Config":
    """The config of a command line, with JAX started as it says, and the user told."""
    from maxconv.config import parse
    from maxconv.processes.start import initialize

    config = parse(arguments)
    notices = (*config.notices, *initialize(config, command))
    import jax

    if jax.process_index() == 0:
        for notice in notices:
            note(notice)
    return config


def convert(arguments: Sequence[str]) -> None:
    from maxconv.jobs import convert

    config = start(arguments)
    from maxconv.cli.reports import TerminalReporter

    convert.run(config, TerminalReporter())


def export(arguments: Sequence[str]) -> None:
    from maxconv.cli.checkpoint_arguments import exported
    from maxconv.jobs import export, prepare_export

    given = exported(arguments)
    config = start(given.arguments, "export")
    if given.is_first and not config.has_output:  # MaxText has a default
        raise UserError("Say where the Hugging Face checkpoint goes: base_output_directory=DIR.")
    from maxconv.cli.reports import TerminalReporter

    with prepare_export.prepared(config, given.checkpoint) as job:
        export.run(job, TerminalReporter())


def relayout(arguments: Sequence[str]) -> None:
    from maxconv.cli.checkpoint_arguments import exported
    from maxconv.jobs import convert, prepare_relayout

    given = exported(arguments, "relayout")
    config = start(given.arguments, "relayout")
    if not config.has_output:  # MaxText has a default
        raise UserError("Say where the new checkpoint goes: base_output_directory=DIR.")
    from maxconv.cli.reports import TerminalReporter

    preparing = partial(prepare_relayout.prepared, checkpoint=given.checkpoint)
    convert.run(config, TerminalReporter(), preparing)


def plan(arguments: Sequence[str]) -> None:
    import jax

    from maxconv.cli.checkpoint_arguments import planned
    from maxconv.cli.plan_page import plan_page
    from maxconv.cli.plan_text import compiled_text, network_text, plan_text
    from maxconv.planning.tpus import slice_of

    config = start(planned(arguments), "plan")
    on = slice_of(config.tpu_type) if config.tpu_type else None
    if config.export:
        _plan_export(config, config.export, on)
        return
    with _planning(config, config.relayout) as job:
        say(plan_text(job, on) + network_text(job.plan, job.source))
        if job.config.compile:
            say(f"\n{compiled_text(job.plan)}")
        if (page := job.config.report) and jax.process_index() == 0:
            Path(page).write_text(plan_page(job, on), encoding="utf-8")


def _planning(config: "Config", checkpoint: str | None) -> AbstractContextManager["Job"]:
    """Plans a conversion, or another layout of a checkpoint."""
    from maxconv.jobs import prepare, prepare_relayout

    if checkpoint is None:
        return prepare.prepared(config, writes=False)
    return prepare_relayout.prepared(config, checkpoint, writes=False)


def _plan_export(config: "Config", checkpoint: str, on: "Slice | None") -> None:
    from maxconv.cli.export_plan import export_plan
    from maxconv.cli.plan_text import compiled_text
    from maxconv.jobs.prepare_export import prepared

    if config.report:
        raise UserError("--report draws conversions only; remove it to plan an export.")
    with prepared(config, checkpoint, writes=False) as job:
        say(export_plan(job, on))
        if config.compile:
            say(f"\n{compiled_text(job.plan)}")


def verify(arguments: Sequence[str]) -> None:
    from maxconv.cli.checkpoint_arguments import exported
    from maxconv.cli.reports import TerminalReporter
    from maxconv.config.paths import checked_path
    from maxconv.jobs import convert
    from maxconv.jobs.export_record import recorded_export
    from maxconv.jobs.recorded import recorded_arguments, recorded_job
    from maxconv.jobs.verify import saved_items

    if not arguments or "=" in arguments[0]:
        raise UserError("Give the checkpoint first: maxconv verify CHECKPOINT.")
    path = checked_path("CHECKPOINT", arguments[0])
    if (made_with := recorded_export(path)) is not None:
        _verify_export(path, [*made_with, *arguments[1:]])
        return
    saved = saved_items(path)
    words, checkpoint = [*recorded_arguments(saved), *arguments[1:]], None
    if recorded_job(saved) == "relayout":
        checkpoint, words, _ = exported(words, "relayout")
    config = start([*words, "--verify=full"], "verify")
    with _planning(config, checkpoint) as job:
        convert.check(job, str(saved), "full", TerminalReporter())


def _verify_export(directory: str, arguments: Sequence[str]) -> None:
    from maxconv.cli.checkpoint_arguments import exported
    from maxconv.cli.reports import TerminalReporter
    from maxconv.jobs.check_export import check
    from maxconv.jobs.prepare_export import prepared

    given = exported(arguments)
    fixed = ["--verify=full", f"base_output_directory={directory}"]
    config = start([*given.arguments, *fixed], "verify")
    with prepared(config, given.checkpoint, writes=False) as job:
        check(job, TerminalReporter())


def inspect(arguments: Sequence[str]) -> None:
    from maxconv.cli.inspect import describe
    from maxconv.config.paths import checked_path

    if len(arguments) != 1:
        raise UserError("Give one checkpoint: maxconv inspect PATH.")
    say(describe(checked_path("PATH", arguments[0])))


def families(arguments: Sequence[str]) -> None:
    from maxconv.cli.family_tables import families_markdown, families_text

    if arguments not in ([], ["--markdown"]):
        raise UserError("maxconv families takes no argument but --markdown.")
    say(families_markdown() if arguments else families_text())


def demo(arguments: Sequence[str]) -> None:
    from maxconv.cli.demo import run
    from maxconv.config.paths import checked_path

    if len(arguments) > 1:
        raise UserError("Give one directory: maxconv demo DIR.")
    run(checked_path("DIR", arguments[0]) if arguments else "maxconv_demo")


def show_help(arguments: Sequence[str]) -> None:
    from maxconv.cli.help import topic, usage

    if len(arguments) > 1:
        raise UserError("Give one topic: maxconv help TOPIC.")
    say(topic(arguments[0]) if arguments else usage())


_TOGETHER = (
    "convert",
    "export",
    "relayout",
    "plan",
    "verify",
)  # the commands that several processes run together
COMMANDS = {
    "convert": convert,
    "export": export,
    "relayout": relayout,
    "plan": plan,
    "verify": verify,
    "inspect": inspect,
    "families": families,
    "demo": demo,
    "help": show_help,
}
