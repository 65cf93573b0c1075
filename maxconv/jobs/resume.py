"""Whether an interrupted conversion can be resumed: it must be the same conversion."""

import hashlib
from collections.abc import Mapping

import jax

from maxconv import __version__
from maxconv.config import Config
from maxconv.planning.plan import Plan
from maxconv.sources import Source
from maxconv.targets import place

PLAN = "the digest of the plan"
_MEMORY = "the memory for buffers (--max_host_memory_gb)"  # matters only if it affects the slabs
_NO_MATTER = ("max_host_memory_gb",)  # covered by _MEMORY
_MANY = 3  # differences that are reported


def identity(config: Config, source: Source, plan: Plan, window: int) -> dict[str, str]:
    """Everything that must be equal for two attempts to write the same bits in the same places.

    `window`: bytes of buffers per process, for which the plan was made.
    """
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
        _MEMORY: f"{window / 2**20:,.0f} MiB",
        PLAN: hashlib.sha256(made.encode()).hexdigest()[:12],
    }


def recorded(directory: str) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """The identity of the conversion to a directory, finished or not, and notices for the user.

    The identity is None if there is none that can be read.
    """
    notices: list[str] = []
    for name in (place.UNFINISHED_WORDS, place.WORDS):
        try:
            if not (found := place.record(directory, name)):  # none, or one being replaced
                continue
            identity = found.get("identity")
            if isinstance(identity, dict) and all(isinstance(v, str) for v in identity.values()):
                return identity, tuple(notices)
            raise ValueError(f"{directory}/{name} is damaged")
        except ValueError as error:
            notices.append(f"{error}, so that conversion cannot be resumed")
    return None, tuple(notices)


def problem(directory: str, was: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """Why a conversion cannot be resumed, in a sentence."""
    if (found := differences(was, now)) is None:
        return None
    return (
        f"{directory} holds another unfinished conversion: {found}; give the same arguments, or "
        "remove --resume to start over."
    )


def differences(was: Mapping[str, str], now: Mapping[str, str]) -> str | None:
    """How the identities of two attempts differ, for people; None if they do not."""
    names = [name for name in dict.fromkeys((*was, *now)) if was.get(name) != now.get(name)]
    # Less memory gives smaller slabs, and so another plan; if not, it does not matter.
    if _MEMORY in names:
        names.remove(PLAN if PLAN in names else _MEMORY)
    # Digests say that something differs; what has a name of its own says what.
    names = [name for name in names if not name.startswith("the digest of")] or names
    differ = [
        f"{name} was {was.get(name, 'not given')} and is {now.get(name, 'not given')}"
        for name in names
    ]
    if not differ:
        return None
    more = f", and {len(differ) - _MANY} more" if len(differ) > _MANY else ""
    return "; ".join(differ[:_MANY]) + more
