"""Opens a checkpoint on all processes, and sees that they have the same."""

from collections.abc import Callable

import jax

from maxconv.config import model_facts
from maxconv.errors import RetryableError
from maxconv.models.head import differs_in_share
from maxconv.processes.agreement import agree, gathered, same_error_everywhere
from maxconv.sources import Source


def opened_by_all(open_at: Callable[[str | None], Source]) -> Source:
    """Opens a checkpoint; on the Hub, all processes at the commit that process 0 finds.

    `open_at`: opens it at a commit, or at the one that it finds.
    """
    source = None
    with same_error_everywhere():
        if jax.process_index() == 0:
            source = open_at(None)
    commit = gathered(source.revision if source else None)[0]
    with same_error_everywhere():
        return source or open_at(commit)


def check_same_everywhere(source: Source) -> None:
    """Checks that all processes have opened the same checkpoint.

    Local copies on several hosts are compared by content, as their modification times differ.

    Raises:
        RetryableError: a source in a bucket or on the Hub changed in between.
        UserError: local copies differ.
    """
    seen = gathered(source.versions() if source.is_shared else {})
    if seen.count(seen[0]) < len(seen):
        raise RetryableError(
            f"{source.root} changed while it was being opened; try again once it does not change."
        )
    with same_error_everywhere():
        found = source.fingerprints()
    content = {f"the content of {file}": digest for file, digest in found.items()}
    agree(content, f"copy {source.root} to all hosts again")


def head_differs(source: Source, model_name: str | None) -> bool:
    """Whether a stored head differs from the table it is tied to; each process reads a share."""
    mine = False
    with same_error_everywhere():
        index, count = jax.process_index(), jax.process_count()
        share = slice(index / count, (index + 1) / count)
        mine = differs_in_share(source, model_facts(model_name), share)
    return any(gathered(mine))
