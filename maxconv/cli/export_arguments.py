"""The command line of an export: ours, and that of MaxText's to_huggingface."""

from collections.abc import Iterator, Sequence

from maxconv.config.paths import read_path
from maxconv.errors import UserError

_CHECKPOINT = "load_parameters_path"
# MaxText's names of what has another one here.
_OURS = {
    "weight_dtype": "--save_dtype",
    "override_model_architecture": "override_model_config",
    "lora.lora_restore_path": "--lora_restore_path",
    "lora.lora_rank": "--lora_rank",
    "lora.lora_alpha": "--lora_alpha",
}
_ADAPTER = ("lora.lora_restore_path", "lora_restore_path")


def exported(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The checkpoint to export, given first or as load_parameters_path, and the other arguments.

    If there is only an adapter, that is what is exported.

    Raises:
        UserError: there is none.
    """
    first, rest = None, list(arguments)
    if rest and not rest[0].startswith("-") and "=" not in rest[0]:
        if not rest[0].endswith((".yml", ".yaml")):
            first = rest.pop(0)
    named = {name: value for name, _, value in map(_split, rest)}
    if checkpoint := first or named.get(_CHECKPOINT):
        return read_path(checkpoint), [*_translated(rest)]
    adapter = next((named[name] for name in _ADAPTER if named.get(name)), None)
    if adapter is None:
        raise UserError(
            "Give the checkpoint first, maxconv export CHECKPOINT, or as load_parameters_path=."
        )
    others = [argument for argument in rest if _split(argument)[0] not in _ADAPTER]
    return read_path(adapter), [*_translated(others)]


def _split(argument: str) -> tuple[str, str, str]:
    return argument.lstrip("-").partition("=")


def _translated(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        name, equals, value = _split(argument)
        if name in _OURS:
            yield f"{_OURS[name]}={value if equals else 'true'}"
        elif name != _CHECKPOINT:
            yield argument
