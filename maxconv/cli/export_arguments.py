"""The command line of an export: ours, and that of MaxText's to_huggingface."""

from collections.abc import Iterator, Sequence

from maxconv.config.paths import read_path
from maxconv.errors import UserError

_CHECKPOINT = "load_parameters_path"
_ADAPTER = "lora.lora_restore_path"
# MaxText's names of what has another one here.
_OURS = {"weight_dtype": "--save_dtype", "override_model_architecture": "override_model_config"}


def exported(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The checkpoint to export, given first or as load_parameters_path, and the other arguments.

    Raises:
        UserError: there is none, or an adapter is to be exported.
    """
    first, rest = None, list(arguments)
    if rest and not rest[0].startswith("-") and "=" not in rest[0]:
        if not rest[0].endswith((".yml", ".yaml")):
            first = rest.pop(0)
    named = {name: value for name, _, value in map(_split, rest)}
    if named.get(_ADAPTER):
        raise UserError(f"{_ADAPTER}: adapters that MaxText trained are not exported; remove it.")
    checkpoint = first or named.get(_CHECKPOINT)
    if not checkpoint:
        raise UserError(
            "Give the checkpoint first, maxconv export CHECKPOINT, or as load_parameters_path=."
        )
    return read_path(checkpoint), [*_translated(rest)]


def _split(argument: str) -> tuple[str, str, str]:
    return argument.lstrip("-").partition("=")


def _translated(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        name, equals, value = _split(argument)
        if name in _OURS:
            yield f"{_OURS[name]}={value if equals else 'true'}"
        elif name not in (_CHECKPOINT, _ADAPTER):
            yield argument
