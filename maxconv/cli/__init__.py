"""The command `maxconv`: its commands, and what they print."""

from maxconv.cli.commands import COMMANDS, convert, export, main, run, script

__all__ = ["COMMANDS", "convert", "export", "main", "run", "script"]
