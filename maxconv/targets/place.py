"""The output directory: checks whether it can be written to, and clears what may be replaced.

Deletes only a checkpoint that the user wants to replace, and the remains of an interrupted
conversion: these are next to a `maxconv.unfinished.json`, and have names that a save creates.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from maxconv.errors import RetryableError, UserError
from maxconv.text import size

if TYPE_CHECKING:
    from maxconv.sources.bucket import Object

STEP = "0"  # MaxText's converter writes step 0
WORDS = "maxconv.json"  # next to the step: how it was made
UNFINISHED_WORDS = "maxconv.unfinished.json"  # the same for a checkpoint that is not finished
UNFINISHED = f"{STEP}.orbax-checkpoint-tmp"  # prefix of Orbax' names of an unfinished step 0
_COMMITTED = "commit_success.txt"  # marks a complete directory in a bucket, which has no renames
_STEP_METADATA = "_CHECKPOINT_METADATA"
_MARKS = {_STEP_METADATA, "items/_METADATA"}  # files of every MaxText checkpoint
_LARGEST_RECORD = 16 << 20  # bytes
# Names that a save creates in a step, and in its items; anything else there is not ours.
_IN_STEP = re.compile(
    r"(_CHECKPOINT_METADATA|commit_success\.txt|descriptor|items|ocdbt\.process_)"
)
_IN_ITEMS = re.compile(
    r"_|array_metadatas|commit_success\.txt|descriptor|manifest\.ocdbt|ocdbt\.process_|d$|step|"
    r"params\.|opt_state|nnx_aux"
)


def items(directory: str) -> str:
    """Where MaxText finds the weights: its load_parameters_path."""
    return f"{directory.rstrip('/')}/{STEP}/items"


def overlaps(directory: str, tree: str) -> bool:
    """Whether a checkpoint in a directory would replace a tree, or lie in the step of it."""
    base, ours, theirs = map(_real, (directory, f"{directory.rstrip('/')}/{STEP}", tree))
    step = theirs.rpartition("/")[0]
    is_in_step = (epath.Path(step) / _STEP_METADATA).exists()
    return _is_within(theirs, ours) or _is_within(base, step if is_in_step else theirs)


def _real(path: str) -> str:
    return path.rstrip("/") if "://" in path else os.path.realpath(path)


def _is_within(path: str, other: str) -> bool:
    return f"{path}/".startswith(f"{other}/")


def is_there(directory: str) -> bool:
    """Whether there is a finished step; on disks, anything with its name."""
    step = epath.Path(directory) / STEP
    return ((step / _COMMITTED) if "://" in directory else step).exists()


def is_renamed(directory: str) -> bool:
    """Whether there is a finished step whose conversion was killed before it recorded that."""
    try:
        return is_there(directory) and (epath.Path(directory) / UNFINISHED_WORDS).exists()
    except Exception:  # not accessible, which `problems` reports
        return False


def problems(directory: str, nbytes: int, overwrite: bool) -> list[str]:
    """Everything that prevents writing `nbytes` bytes there, in sentences."""
    check = _bucket_problems if "://" in directory else _local_problems
    return list(check(directory, nbytes, overwrite))


def record(directory: str, name: str) -> dict[str, Any] | None:
    """The record next to a checkpoint, `WORDS` or `UNFINISHED_WORDS`; None if there is none.

    Raises:
        ValueError: it is damaged.
    """
    path = epath.Path(directory) / name
    if not path.exists():
        return None
    found = None
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().length <= _LARGEST_RECORD:  # not a pipe or a device
            found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged")
    return found


def leave_record(directory: str, name: str, record: Mapping[str, Any]) -> None:
    """Records next to the checkpoint how it is made: for verify, --resume and users."""
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(record, indent=2) + "\n")


def clear(directory: str) -> None:
    """Removes step 0, and the remains of interrupted conversions.

    `problems` must have been called and found nothing. If this is interrupted, either the whole
    checkpoint remains or none, and the remains are recognized as those of a conversion.
    """
    root = epath.Path(directory)
    # Written first, and without an identity: what is partly removed can be cleared, but not
    # resumed.
    leave_record(directory, UNFINISHED_WORDS, {})
    for path in root.glob(f"{UNFINISHED}*"):
        path.rmtree()
    withdraw(directory)
    (root / WORDS).unlink(missing_ok=True)
    for path in (root / UNFINISHED, root / STEP):
        if path.exists():
            path.rmtree()


def withdraw(directory: str) -> None:
    """Turns step 0, if there is one, into an unfinished step, which does not load."""
    step = epath.Path(directory) / STEP
    if "://" in directory:
        (step / _COMMITTED).unlink(missing_ok=True)
    elif step.exists():
        step.rename(step.with_name(UNFINISHED))


def _local_problems(directory: str, nbytes: int, overwrite: bool) -> Iterator[str]:
    step = Path(directory, STEP)
    there = nearest(Path(directory))
    if not there.is_dir():
        yield f"{there} is a file, but base_output_directory must be a directory."
        return
    try:
        tempfile.TemporaryFile(dir=there).close()  # has no name: nobody ever sees it
        old = [
            path for path in (step, *step.parent.glob(f"{UNFINISHED}*")) if os.path.lexists(path)
        ]
        names = {path.name: _names(path) for path in old}
        free = shutil.disk_usage(there).free + sum(map(nbytes_in, old))
    except OSError as error:
        yield f"{there} cannot be written to ({error.strerror}); name another directory."
        return
    for path in (Path(directory, WORDS), Path(directory, UNFINISHED_WORDS)):
        if os.path.lexists(path) and not path.is_file():
            yield f"{path} is not a regular file, but maxconv needs to write one there; remove it."
    has_record = Path(directory, UNFINISHED_WORDS).is_file()
    yield from _not_to_delete(directory, names, step.name in names, has_record, overwrite)
    needed = int(nbytes * 1.01) + (1 << 20)  # overhead of Orbax and the file system
    if free < needed:
        yield (
            f"{there} has {size(free)} free, but the checkpoint needs {size(needed)}; free some "
            "space, or name another directory."
        )


def scratch_problems(directory: str, nbytes: int) -> list[str]:
    """Everything that prevents storing `nbytes` bytes temporarily in a directory, in sentences."""
    there = nearest(Path(directory))
    try:
        tempfile.TemporaryFile(dir=there).close()
        free = shutil.disk_usage(there).free
    except OSError as error:
        return [f"{there} cannot be written to ({error.strerror}); set HF_HOME."]
    if free >= nbytes:
        return []
    return [
        f"{there} has {size(free)} free, but staging the upload to the Hub needs {size(nbytes)}; "
        "free some space, set HF_HOME, or reduce --max_host_memory_gb."
    ]


def _bucket_problems(directory: str, nbytes: int, overwrite: bool) -> Iterator[str]:
    del nbytes  # buckets have no size limit
    if not directory.startswith("gs://"):
        yield f"{directory} is not supported; give a directory, or gs://BUCKET/DIRECTORY."
        return
    try:
        objects = objects_in(directory)
    except UserError as error:
        yield from error.problems
        return
    names: dict[str, set[str]] = {}
    for name in objects:
        first, _, rest = name.partition("/")
        if first == STEP or first.startswith(UNFINISHED):
            names.setdefault(first, set()).add(rest)
    is_finished = _COMMITTED in names.get(STEP, ())
    has_record = UNFINISHED_WORDS in objects
    yield from _not_to_delete(directory.rstrip("/"), names, is_finished, has_record, overwrite)


def objects_in(directory: str, to_write: bool = True) -> "dict[str, Object]":
    """The objects below a directory in a bucket, `gs://bucket/path`.

    `to_write`: whether to check that it can be written to.

    Raises:
        UserError: it cannot be written to, or not be reached.
        RetryableError: the server fails.
    """
    from maxconv.sources import bucket as gcs

    try:
        bucket, _, path = directory.removeprefix("gs://").rstrip("/").partition("/")
        if to_write:
            gcs.Bucket(bucket).check_writable(path)
        return gcs.Bucket(bucket).objects(path and f"{path}/")
    except gcs.Refused as error:
        raise UserError(str(error)) from None
    except RetryableError:
        raise
    except Exception as error:  # those of the network, of the account, and of their libraries
        why = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{directory} cannot be reached ({why}); check its name and your access to it."
        ) from None


def _not_to_delete(
    directory: str,
    names: Mapping[str, Set[str]],
    is_finished: bool,
    has_record: bool,
    overwrite: bool,
) -> Iterator[str]:
    """A sentence for everything that a conversion would have to delete but must not.

    Args:
        names: of step 0 and unfinished steps, the relative paths in each, as from `_names`.
        is_finished: whether step 0 is finished.
        has_record: whether an interrupted conversion left its record.
        overwrite: whether a checkpoint may be replaced.
    """
    for name, inside in sorted(names.items()):
        path = f"{directory}/{name}"
        if name == STEP and is_finished:
            if not overwrite:
                yield f"{path} exists; add --overwrite to replace it, or name another directory."
            elif inside and inside.isdisjoint(_MARKS):
                yield (
                    f"{path} is not a MaxText checkpoint, so --overwrite does not replace it; "
                    "remove it, or name another directory."
                )
            continue
        foreign = sorted(map(_foreign, inside)) if has_record else [""]
        if not has_record or any(foreign):
            what = "/".join(filter(None, (path, foreign[-1])))
            yield (
                f"{what} was not written by maxconv, which does not delete it; remove it, or name "
                "another directory."
            )


def _foreign(name: str) -> str:
    """The part of a relative path in a step that no save creates; empty if a save does."""
    first, _, rest = name.partition("/")
    if not _IN_STEP.match(first):
        return first
    second = rest.partition("/")[0]
    is_foreign = first.startswith("items") and second and not _IN_ITEMS.match(second)
    return f"{first}/{second}" if is_foreign else ""


def _names(path: Path) -> set[str]:
    """The relative paths in a directory, two levels deep; {"/"} if it is not a directory."""
    if path.is_symlink() or not path.is_dir():
        return {"/"}  # a name that nothing has
    below = [*path.iterdir()]
    deeper = [p for b in below if b.is_dir() and not b.is_symlink() for p in b.iterdir()]
    return {p.relative_to(path).as_posix() for p in (*below, *deeper)}


def nearest(path: Path) -> Path:
    """The path itself, or the first directory above it that exists."""
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def nbytes_in(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
