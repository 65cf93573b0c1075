"""What processes tell each other before they go on: facts, errors, and that something is done."""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from maxconv.errors import ConversionError, RetryableError, UserError

PATIENCE = 120  # seconds for all processes to say what they are about to do
_calls = itertools.count()


def agree(facts: Mapping[str, Any], mend: str) -> None:
    """Checks that all processes have the same facts, by name, as JSON has them.

    Does without collectives: those hang, or abort, when processes compile different programs for
    different devices. So it can be called before JAX has a backend.

    Args:
        facts: are compared with those of process 0.
        mend: what to do about a difference, for the end of a sentence.

    Raises:
        UserError: the same on all processes; names each fact, process and both values.
        RetryableError: not all processes came to say theirs.
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
            f"Not all processes said within {PATIENCE} s what they are about to do "
            f"({str(error).partition('. ')[0]}); is one release of maxconv installed on all hosts?"
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
    """Prepares something on every process; an error on any of them is raised on all.

    Nothing is written yet, so what no check foresaw is bad input, too: a UserError.
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
    """An error as the others are told of it: its kind, and its problems."""
    if isinstance(error, ConversionError):
        kind = type(error).__name__
        return kind if kind in _KINDS else ConversionError.__name__, error.problems
    logging.getLogger(__name__).debug("while a conversion was prepared", exc_info=error)
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, ConnectionError | TimeoutError):
        return RetryableError.__name__, [f"The connection failed ({said}); try again."]
    return UserError.__name__, [
        f"The checkpoint or the arguments cannot be used ({said}); check that the files are whole, "
        "and report it if they are."
    ]


def untold(kind: str, problems: Sequence[str]) -> ConversionError:
    """The error that another process told of."""
    return _KINDS[kind](problems)


def gathered(value: Any) -> list[Any]:
    """What each process has to say, as JSON has it, in the order of processes."""
    import jax

    if jax.process_count() == 1:
        return [value]
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = int(multihost_utils.process_allgather(np.int32(text.size)).max())
    width = -(-longest // 4096) * 4096  # mostly the same: compiled once
    rows = multihost_utils.process_allgather(np.pad(text, (0, width - text.size)))
    return [json.loads(row.tobytes().rstrip(b"\0")) for row in rows]


def once(action: Callable[[], object], patience: int | None = None) -> None:
    """Does something on process 0, while the others wait for it to be done.

    `patience`: seconds that it may take, if more than collectives wait.
    """
    import jax

    if jax.process_index() == 0:
        action()
    if jax.process_count() == 1:
        return
    if patience is not None:
        from maxconv.private.jax import global_state

        client: Any = global_state.client
        client.wait_at_barrier("maxconv: done at length", timeout_in_ms=1000 * patience)
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("maxconv: done on process 0")
