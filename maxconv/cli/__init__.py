"""The command `maxconv`: its commands, and what they print."""

from maxconv.cli.commands import COMMANDS, convert, main, run, script

__all__ = ["COMMANDS", "convert", "main", "run", "script"]
