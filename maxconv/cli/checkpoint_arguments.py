"""Command lines of jobs that read a MaxText checkpoint, and that of MaxText's to_huggingface."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from maxconv.config.paths import read_path
from maxconv.errors import UserError

_CHECKPOINT = "load_parameters_path"
_PLANNED = ("--export", "--relayout")
# MaxText's names of what has another one here.
_OURS = {
    "weight_dtype": "--save_dtype",
    "override_model_architecture": "override_model_config",
    "lora.lora_restore_path": "--lora_restore_path",
    "lora.lora_rank": "--lora_rank",
    "lora.lora_alpha": "--lora_alpha",
}
_ADAPTER = ("lora.lora_restore_path", "lora_restore_path")


class Exported(NamedTuple):
    """The command line of an export.

    Attributes:
        checkpoint: to export.
        arguments: the others, under our names.
        is_first: whether the checkpoint came first; else as MaxText has it.
    """

    checkpoint: str
    arguments: list[str]
    is_first: bool


def exported(arguments: Sequence[str], command: str = "export") -> Exported:
    """Reads the command line of an export, or of another command that reads a MaxText checkpoint,
    which it names first or as load_parameters_path.

    If there is only an adapter, that is what is exported.

    Raises:
        UserError: there is none.
    """
    rest = list(arguments)
    first = rest.pop(0) if rest and _is_path(rest[0]) else None
    named = {name: value for name, _, value in map(_split, rest)}
    if checkpoint := first or named.get(_CHECKPOINT):
        return Exported(read_path(checkpoint), [*_translated(rest)], first is not None)
    adapter = next((named[name] for name in _ADAPTER if named.get(name)), None)
    if adapter is None or command != "export":
        raise UserError(
            f"Give the checkpoint first, maxconv {command} CHECKPOINT or maxconv plan --{command} "
            "CHECKPOINT, or as load_parameters_path=."
        )
    others = [argument for argument in rest if _split(argument)[0] not in _ADAPTER]
    return Exported(read_path(adapter), [*_translated(others)], False)


def planned(arguments: Sequence[str]) -> list[str]:
    """The arguments of `maxconv plan`; with --export or --relayout, those of that command under our
    names, and the checkpoint as the value of --export or --relayout, which it may follow.

    Raises:
        UserError: as `exported`.
    """
    rest = list(arguments)
    at = next((i for i, text in enumerate(rest) if text.partition("=")[0] in _PLANNED), None)
    if at is None:
        return rest
    flag, _, checkpoint = rest.pop(at).partition("=")
    if not checkpoint and at < len(rest) and _is_path(rest[at]):
        checkpoint = rest.pop(at)
    named = [f"{_CHECKPOINT}={checkpoint}"] * bool(checkpoint)
    given = exported([*named, *rest], flag.removeprefix("--"))
    return [*given.arguments, f"{flag}={given.checkpoint}"]


def _is_path(argument: str) -> bool:
    """Whether an argument is the checkpoint, which has no name."""
    is_yml = argument.endswith((".yml", ".yaml"))
    return not argument.startswith("-") and "=" not in argument and not is_yml


def _split(argument: str) -> tuple[str, str, str]:
    return argument.lstrip("-").partition("=")


def _translated(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        name, equals, value = _split(argument)
        if name in _OURS:
            yield f"{_OURS[name]}={value if equals else 'true'}"
        elif name != _CHECKPOINT:
            yield argument
