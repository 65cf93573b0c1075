"""Exchange between processes: they compare facts, share errors, and wait for each other."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from maxconv.errors import ConversionError, RetryableError, UserError

PATIENCE = 120  # seconds for all processes to report their facts
_calls = itertools.count()


def agree(facts: Mapping[str, Any], mend: str) -> None:
    """Checks that all processes have the same facts: JSON values by name.

    Uses no collectives, which hang or abort if processes compile different programs for different
    devices, and so can be called before JAX has a backend.

    Args:
        facts: compared with those of process 0.
        mend: the end of the error message: what to do about a difference.

    Raises:
        UserError: the same on all processes; names each fact, process and both values.
        RetryableError: not all processes reported in time.
    """
    from maxconv.private.jax import global_state as state

    client: Any = state.client
    if client is None or state.num_processes == 1:
        return
    from jax.errors import JaxRuntimeError

    key = f"maxconv/agree/{next(_calls)}"
    try:
        if state.process_id == 0:
            client.key_value_set(f"{key}/facts", json.dumps(facts))
        first = json.loads(client.blocking_key_value_get(f"{key}/facts", 1000 * PATIENCE))
        if problems := _differences(first, facts, state.process_id, mend):
            client.key_value_set(f"{key}/problems/{state.process_id:06}", json.dumps(problems))
        client.wait_at_barrier(key, timeout_in_ms=1000 * PATIENCE)
        said = client.key_value_dir_get(f"{key}/problems/")
    except JaxRuntimeError as error:
        raise RetryableError(
            f"Not all processes reported their arguments within {PATIENCE} s "
            f"({str(error).partition('. ')[0]}); check that all hosts have the same release of "
            "maxconv."
        ) from error
    if said:
        raise UserError([problem for _, text in sorted(said) for problem in json.loads(text)])


def _differences(
    first: Mapping[str, Any], facts: Mapping[str, Any], process: int, mend: str
) -> list[str]:
    facts = json.loads(json.dumps(facts))
    return [
        f"{name} is {first.get(name, 'absent')} on process 0 and {facts.get(name, 'absent')} on "
        f"process {process}; {mend}."
        for name in dict.fromkeys((*first, *facts))
        if first.get(name) != facts.get(name)
    ]


@contextmanager
def same_error_everywhere() -> Iterator[None]:
    """Runs the block on every process; an error on any of them is raised on all.

    For use before anything is written: an unexpected error is treated as bad input, a UserError.
    """
    mine: tuple[str, Sequence[str]] | None = None
    try:
        yield
    except Exception as error:
        mine = told(error)
    if failed := next(filter(None, gathered(mine)), None):
        raise untold(*failed)


_KINDS = {kind.__name__: kind for kind in (ConversionError, RetryableError, UserError)}


def told(error: Exception) -> tuple[str, Sequence[str]]:
    """An error in the form that is sent to other processes: its kind, and its problems."""
    if isinstance(error, ConversionError):
        kind = type(error).__name__
        return kind if kind in _KINDS else ConversionError.__name__, error.problems
    logging.getLogger(__name__).debug("while a conversion was prepared", exc_info=error)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ConnectionError | TimeoutError):
        return RetryableError.__name__, [f"The connection failed ({said}); try again."]
    return UserError.__name__, [
        f"The checkpoint or the arguments cannot be used ({said}); check that the files are "
        "intact, and report this if they are."
    ]


def untold(kind: str, problems: Sequence[str]) -> ConversionError:
    """The error that another process told of."""
    return _KINDS[kind](problems)


def gathered(value: Any) -> list[Any]:
    """Gathers a JSON value from each process, in the order of processes."""
    import jax

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(text.size)).max())
    width = -(-longest // 4096) * 4096  # mostly the same width, so that it is compiled once
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def once(action: Callable[[], object], patience: int | None = None) -> None:
    """Runs an action on process 0, while the others wait.

    `patience`: seconds that it may take, if that is longer than the timeout of collectives.
    """
    import jax

    if jax.process_index() == 0:
        action()
    if jax.process_count() == 1:
        return
    if patience is not None:
        wait_for_all("done at length", patience)
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("maxconv: done on process 0")


def wait_for_all(what: str, patience: int) -> None:
    """Waits until every process has come here, for up to `patience` seconds.

    `what`: names the place; each name may be used once.
    """
    from maxconv.private.jax import global_state

    client: Any = global_state.client
    if client is not None and global_state.num_processes != 1:
        client.wait_at_barrier(f"maxconv: {what}", timeout_in_ms=1000 * patience)
