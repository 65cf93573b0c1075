"""What processes tell each other before they go on: facts, errors, and that something is done."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from maxconv.errors import UserError


@contextmanager
def same_error_everywhere() -> Iterator[None]:
    """Runs a check on every process; a UserError on any of them is raised on all."""
    mine: tuple[str, ...] = ()
    try:
        yield
    except UserError as error:
        mine = error.problems
    if problems := next(filter(None, gathered(mine)), None):
        raise UserError(problems)


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
