"""Whether an interrupted export can be resumed: it must be the same export."""

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from maxconv.jobs import resume
from maxconv.processes.agreement import gathered
from maxconv.targets.export_target import Differs

if TYPE_CHECKING:
    from maxconv.jobs.prepare_export import Export


def terms(export: "Export") -> tuple[Mapping[str, Any], Differs | None]:
    """What an export records of itself, and how it is compared with an earlier attempt."""
    now = gathered(_identity(export))[0]  # local copies differ in their modification times
    return now, partial(_changed, now=now) if export.config.resume else None


def _identity(export: "Export") -> dict[str, str]:
    """Everything that must be equal for two attempts to write the same bits in the same places."""
    digest = hashlib.sha256()
    for file in export.files:
        digest.update(repr((file.name, file.process, file.header)).encode())
    return {
        **resume.identity(export.config, export.tree, export.plan, export.window),
        **export.published.versions(),
        "the digest of the files": digest.hexdigest()[:12],
    }


def _changed(was: Mapping[str, Any], now: Mapping[str, str]) -> str | None:
    """Why an export starts over, in a sentence."""
    found = resume.differences({name: str(value) for name, value in was.items()}, now)
    return None if found is None else f"the export starts over, because {found}"
