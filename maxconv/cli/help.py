"""What `maxconv --help`, `maxconv COMMAND --help` and `maxconv help TOPIC` print."""

import textwrap
from pathlib import Path

from maxconv.config.options import KEYS, OPTIONS, Option
from maxconv.errors import UserError

_GUIDE = Path(__file__).parents[1] / "guide"
_WIDTH, _INDENT = 98, 36

# Of each command: its arguments, what it does, and more about it.
COMMANDS = {
    "convert": (
        "[base.yml] key=value ... [--flag=value ...]",
        "Convert a Hugging Face checkpoint to a MaxText checkpoint.",
    ),
    "plan": (
        "[base.yml] key=value ... [--flag=value ...]",
        "Show what a conversion would do, without reading a tensor.",
    ),
    "verify": (
        "CHECKPOINT [key=value ...] [--flag=value ...]",
        "Read a converted checkpoint back, and compare every bit with its source.",
    ),
    "inspect": ("PATH", "List what a Hugging Face or Orbax checkpoint holds."),
    "families": ("[--markdown]", "List the models that can be converted."),
    "demo": ("[DIR]", "Make a small checkpoint, convert it on 8 simulated devices, verify it."),
    "help": ("[TOPIC]", "Print a page of the guide."),
}
_MORE = {
    "convert": "The checkpoint is written to base_output_directory/0/items. `python -m "
    "maxconv.to_maxtext` takes the same arguments, which are those of MaxText's to_maxtext.",
    "plan": "It takes the arguments of the conversion. With --tpu_type it needs no TPU.",
    "verify": "CHECKPOINT is DIR, DIR/0 or DIR/0/items. The arguments of the conversion are "
    "recorded beside it; those that are given here win.",
    "inspect": "PATH is a directory, gs://bucket/path or hf://org/name. Only metadata is read.",
    "families": "--markdown prints the table of the README.",
    "demo": "DIR is maxconv_demo by default.",
}
EXIT_CODES = """\
Exit codes: 0 done; 2 invalid arguments or input, nothing was written; 42 worth trying again;
130 interrupted; 1 anything else.
"""


def usage() -> str:
    """The commands, for `maxconv --help`."""
    lines = ["maxconv: Hugging Face safetensors to MaxText (Orbax) checkpoints, on the slice.", ""]
    for name, (arguments, what) in COMMANDS.items():
        lines += [f"  maxconv {name} {arguments}", f"      {what}"]
    topics = f"`maxconv COMMAND --help` lists its options. Topics of the guide: {_names()}."
    return "\n".join([*lines, "", topics, EXIT_CODES])


def command_help(name: str) -> str:
    """What a command does, with all its options."""
    arguments, what = COMMANDS[name]
    lines = [f"maxconv {name} {arguments}", "", what]
    if name in _MORE:
        lines += textwrap.wrap(_MORE[name], _WIDTH)
    options = {key: o for key, o in OPTIONS.items() if name in o.commands}
    if options:
        lines += ["", "Keys of MaxText:"]
        for key, meaning in KEYS.items():
            lines += _entry(f"{key}=", meaning)
        lines += ["", "Flags:"]
        for key, option in options.items():
            lines += _entry(_spelled(key, option), _meaning(option))
        lines += ["", *textwrap.wrap(_OTHERS, _WIDTH), "", EXIT_CODES.rstrip()]
    return "\n".join([*lines, ""])


_OTHERS = (
    "Keys and flags may be given in any order, flags also as `--flag value`; --flagfile=FILE reads "
    "more of them from a file, one a line. Other keys of MaxText are accepted, and listed as "
    "having no effect on a conversion."
)


def topic(name: str) -> str:
    """A page of the guide.

    Raises:
        UserError: there is no such page.
    """
    page = _GUIDE / f"{name}.md"
    if page.parent != _GUIDE or not page.is_file():
        raise UserError(f"There is no help about {name}; topics are {_names()}.")
    return page.read_text(encoding="utf-8")


def _names() -> str:
    return ", ".join(sorted(page.stem for page in _GUIDE.glob("*.md")))


def _spelled(name: str, option: Option) -> str:
    return f"--{name}" if option.kind is bool and option.default is False else f"--{name}="


def _meaning(option: Option) -> str:
    if option.default is None or option.default is False or "default" in option.help:
        return option.help
    return f"{option.help}. Default: {option.default}"


def _entry(name: str, meaning: str) -> list[str]:
    """An option and what it means, in two columns."""
    lines = textwrap.wrap(meaning, _WIDTH - _INDENT)
    first = f"  {name}"
    if len(first) >= _INDENT:
        return [first, *(" " * _INDENT + line for line in lines)]
    return [first.ljust(_INDENT) + lines[0], *(" " * _INDENT + line for line in lines[1:])]
