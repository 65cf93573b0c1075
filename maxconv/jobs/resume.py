"""Whether a conversion that was cut off can be resumed: it must be the very same."""

import hashlib
import json
from collections.abc import Mapping

import jax
from etils import epath

from maxconv import __version__
from maxconv.config import Config
from maxconv.planning.plan import Plan
from maxconv.sources import Source
from maxconv.targets import place

_NO_MATTER = ("max_host_memory_gb",)  # to the bits
_MANY = 3  # differences that are worth telling


def identity(config: Config, source: Source, plan: Plan) -> dict[str, str]:
    """What must be the same for two attempts to make the same bits in the same places."""
    words = (word.partition("=") for word in config.words)
    leaves = [  # with the shape of their slabs, which is that of the chunks in storage
        (p.name, p.shape, str(p.dtype), str(p.sharding.spec), p.slabs[0].shape) for p in plan.leaves
    ]
    devices = [(d.id, d.process_index) for d in plan.mesh.devices.flat]
    made = repr((leaves, plan.mesh.axis_names, plan.mesh.devices.shape, devices))
    return {
        "maxconv": __version__,
        **{name: value for name, _, value in words if name not in _NO_MATTER},
        "the number of processes": str(jax.process_count()),
        **source.versions(),
        "the digest of the plan": hashlib.sha256(made.encode()).hexdigest()[:12],
    }


def recorded(directory: str) -> dict[str, str] | None:
    """The identity of the conversion to a directory, finished or not; None if there is none."""
    for name in (place.UNFINISHED_WORDS, place.WORDS):
        try:
            return json.loads((epath.Path(directory) / name).read_text())["identity"]
        except (OSError, ValueError, KeyError):
            pass
    return None


def problem(directory: str, was: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Why a conversion cannot be gone on with, in a sentence."""
    differ = [
        f"{name} was {was.get(name, 'not given')} and is {now.get(name, 'not given')}"
        for name in dict.fromkeys((*was, *now))
        if was.get(name) != now.get(name)
    ]
    if not differ:
        return None
    more = f", and {len(differ) - _MANY} more" if len(differ) > _MANY else ""
    return (
        f"{directory} holds another unfinished conversion: {'; '.join(differ[:_MANY])}{more}; "
        "give the same words, or leave out --resume to start again."
    )
