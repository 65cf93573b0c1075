"""What `maxconv --help`, `maxconv COMMAND --help` and `maxconv help TOPIC` print."""

import textwrap
from pathlib import Path

from maxconv.config.options import KEYS, MEANINGS, OPTIONS, Option
from maxconv.errors import UserError

_GUIDE = Path(__file__).parents[1] / "guide"
_WIDTH, _INDENT = 98, 36

# Of each command: its arguments, what it does, and more about it.
COMMANDS = {
    "convert": (
        "[base.yml] key=value ... [--flag=value ...]",
        "Convert a Hugging Face checkpoint to a MaxText checkpoint.",
    ),
    "export": (
        "CHECKPOINT --hf_model_path=MODEL base_output_directory=DIR [key=value ...]",
        "Write a MaxText checkpoint as a Hugging Face checkpoint.",
    ),
    "relayout": (
        "CHECKPOINT base_output_directory=DIR [key=value ...] [--flag=value ...]",
        "Write a MaxText checkpoint in another layout.",
    ),
    "plan": (
        "[base.yml] key=value ... [--flag=value ...]",
        "Show what a conversion, an export or a new layout would do, without reading any tensor.",
    ),
    "verify": (
        "CHECKPOINT [key=value ...] [--flag=value ...]",
        "Read back what maxconv wrote and compare every bit with its source.",
    ),
    "inspect": ("PATH", "List the tensors of a Hugging Face or Orbax checkpoint."),
    "families": ("[--markdown]", "List the supported models and their Hub repositories."),
    "demo": ("[DIR]", "Make a small checkpoint, convert it on 8 simulated devices and verify it."),
    "help": ("[TOPIC]", "Print a page of the guide."),
}
_MORE = {
    "convert": "The checkpoint is written to base_output_directory/0/items. The arguments are "
    "those of MaxText's to_maxtext; `python -m maxconv.to_maxtext` takes the same ones.",
    "export": "CHECKPOINT is what was converted or trained: DIR, DIR/0/items, or a run's directory "
    "or its checkpoints, of which the last step is taken. MODEL is a checkpoint of the same model: "
    "names, shapes, dtypes, config.json and tokenizer are taken from there, and what MaxText does "
    "not train. A LoRA adapter becomes files of PEFT, or is merged. On several hosts DIR must be "
    "shared by all of them.",
    "relayout": "CHECKPOINT is what was converted or trained, as for export. Layers are stacked or "
    "taken apart (scan_layers, param_scan_axis), and arrays cut for another mesh, in another "
    "storage format or dtype; what no argument names stays as it is. The result is written to "
    "DIR/0/items. With --train_state a run of MaxText goes on from it.",
    "plan": "Takes the same arguments as convert, and reads only the headers of the checkpoint. "
    "With --tpu_type it plans for a slice that you do not have. With --export CHECKPOINT or "
    "--relayout CHECKPOINT it takes the arguments of that command instead.",
    "verify": "CHECKPOINT is DIR, DIR/0 or DIR/0/items, where DIR was the base_output_directory of "
    "the job. Its other arguments are read from DIR/maxconv.json; arguments "
    "given here override them, for instance if the source has moved. The source of an export "
    "or of a new layout is load_parameters_path.",
    "inspect": "PATH is a directory, gs://bucket/path or hf://org/name. Only metadata is read.",
    "families": "--markdown prints the table of models in the README.",
    "demo": "The files are written to DIR, by default ./maxconv_demo.",
    "help": "Without a TOPIC, list the commands and the topics.",
}
EXIT_CODES = """\
Exit codes:
  0    done
  2    invalid arguments or input; nothing was written
  42   temporary failure, such as a preempted host or a lost connection: run it again
  130  interrupted
  1    any other failure
"""


def usage() -> str:
    """The commands, for `maxconv --help`."""
    lines = [
        "Converts Hugging Face safetensors checkpoints to MaxText (Orbax) checkpoints, on the TPU "
        "slice\nthat will train them, or on a CPU.",
        "",
        "Commands:",
    ]
    for name, (arguments, what) in COMMANDS.items():
        lines += [f"  maxconv {name} {arguments}", f"      {what}"]
    lines += ["", "`maxconv COMMAND --help` describes the options of a command.", ""]
    lines += ["Topics of the guide, for `maxconv help TOPIC`:", *_topics()]
    return "\n".join([*lines, "", EXIT_CODES])


def command_help(name: str) -> str:
    """What a command does, and all its options."""
    arguments, what = COMMANDS[name]
    lines = [f"maxconv {name} {arguments}", "", what]
    if name in _MORE:
        lines += textwrap.wrap(_MORE[name], _WIDTH)
    meanings = MEANINGS.get(name, {})
    options = {key: o for key, o in OPTIONS.items() if name in o.commands}
    if options:
        lines += ["", "MaxText config keys:"]
        for key, of in KEYS.items():
            if name in of.commands:
                lines += _entry(f"{key}=", meanings.get(key, of.help))
        lines += ["", "Flags:"]
        for key, option in options.items():
            lines += _entry(_spelled(key, option), meanings.get(key, _meaning(option)))
        lines += ["", *textwrap.wrap(_SYNTAX, _WIDTH), "", EXIT_CODES.rstrip()]
    return "\n".join([*lines, ""])


_SYNTAX = (
    "Keys and flags may come in any order. A flag may also be written `--flag value`; a boolean "
    "one such as --resume needs no value. --flagfile=FILE reads more arguments from a file, one "
    "per line. MaxText keys that do not affect a conversion are accepted and listed in a note."
)


def topic(name: str) -> str:
    """A page of the guide.

    Raises:
        UserError: there is no such page.
    """
    page = _GUIDE / f"{name}.md"
    if page.parent != _GUIDE or not page.is_file():
        raise UserError(f"There is no guide page {name}; topics are {', '.join(_pages())}.")
    return page.read_text(encoding="utf-8")


def _pages() -> dict[str, Path]:
    """The pages of the guide by topic."""
    return {page.stem: page for page in sorted(_GUIDE.glob("*.md"))}


def _topics() -> list[str]:
    """A line for each topic, with the title of its page."""
    titles = {name: p.read_text(encoding="utf-8").partition("\n") for name, p in _pages().items()}
    return [f"  {name:<8} {title.removeprefix('# ')}" for name, (title, _, _) in titles.items()]


def _spelled(name: str, option: Option) -> str:
    return f"--{name}" if option.kind is bool and option.default is False else f"--{name}="


def _meaning(option: Option) -> str:
    if option.default is None or option.default is False or "Default:" in option.help:
        return option.help
    return f"{option.help}. Default: {option.default}"


def _entry(name: str, meaning: str) -> list[str]:
    """An option and what it means, in two columns."""
    lines = textwrap.wrap(meaning, _WIDTH - _INDENT)
    first = f"  {name}"
    if len(first) >= _INDENT:
        return [first, *(" " * _INDENT + line for line in lines)]
    return [first.ljust(_INDENT) + lines[0], *(" " * _INDENT + line for line in lines[1:])]
