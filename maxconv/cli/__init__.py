"""The command `maxconv`: its commands, and what they print."""

from maxconv.cli.commands import COMMANDS, USAGE, convert, main, run, script

__all__ = ["COMMANDS", "USAGE", "convert", "main", "run", "script"]
