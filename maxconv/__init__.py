"""maxconv: Hugging Face safetensors to MaxText (Orbax) checkpoints, converted where they train.

`abstract`, `load` and `stream` bring a checkpoint straight into a process; see the guide, "Into a
process".
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxconv.jobs.abstract import abstract
    from maxconv.jobs.load import load, stream

__version__ = "0.1.0"
__all__ = ["abstract", "load", "stream"]


def __getattr__(name: str) -> Any:
    """Imports the Python API, and with it JAX, only when it is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from maxconv.jobs import abstract, load

    return getattr(abstract if name == "abstract" else load, name)
