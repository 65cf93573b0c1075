"""The place where a checkpoint goes: checked before, never half-written.

Nothing is deleted there but a checkpoint that the user wants replaced, and what a conversion left
that was cut off: that lies beside `maxconv.unfinished.json`, and has the names that a save makes.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

from etils import epath

from maxconv.errors import RetryableError
from maxconv.text import size

STEP = "0"  # MaxText's converter writes step 0
WORDS = "maxconv.json"  # beside the step: how it was made
UNFINISHED_WORDS = "maxconv.unfinished.json"  # the same, of one that is not there yet
UNFINISHED = f"{STEP}.orbax-checkpoint-tmp"  # how Orbax' names of an unfinished step 0 begin
_COMMITTED = "commit_success.txt"  # makes a directory in a bucket, which has no renames, complete
_MARKS = {"_CHECKPOINT_METADATA", "items/_METADATA"}  # what a checkpoint of MaxText has
_LARGEST_RECORD = 16 << 20  # bytes
# What a save makes in a step, and in its items: other things there are not ours.
_IN_STEP = re.compile(
    r"(_CHECKPOINT_METADATA|commit_success\.txt|descriptor|items|ocdbt\.process_)"
)
_IN_ITEMS = re.compile(
    r"_|array_metadatas|commit_success\.txt|descriptor|manifest\.ocdbt|ocdbt\.process_|d$|step|"
    r"params\.|opt_state"
)


def items(directory: str) -> str:
    """Where MaxText finds the weights: its load_parameters_path."""
    return f"{directory.rstrip('/')}/{STEP}/items"


def is_there(directory: str) -> bool:
    """Whether there is a finished step, or on disks anything in its place."""
    step = epath.Path(directory) / STEP
    return ((step / _COMMITTED) if "://" in directory else step).exists()


def is_renamed(directory: str) -> bool:
    """Whether there is a finished step whose conversion was killed before it recorded that."""
    try:
        return is_there(directory) and (epath.Path(directory) / UNFINISHED_WORDS).exists()
    except Exception:  # it cannot be reached, which `problems` says in a sentence
        return False


def problems(directory: str, nbytes: int, overwrite: bool) -> list[str]:
    """What stands in the way of writing `nbytes` there, in sentences."""
    check = _bucket_problems if "://" in directory else _local_problems
    return list(check(directory, nbytes, overwrite))


def record(directory: str, name: str) -> dict[str, Any] | None:
    """What a conversion left beside its checkpoint, `WORDS` or `UNFINISHED_WORDS`; None if nothing.

    Raises:
        ValueError: it is damaged.
    """
    path = epath.Path(directory) / name
    if not path.exists():
        return None
    found = None
    with suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().length <= _LARGEST_RECORD:  # no pipe, nor a device
            found = json.loads(path.read_bytes())
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged")
    return found


def leave_record(directory: str, name: str, record: Mapping[str, Any]) -> None:
    """Says beside the checkpoint how it is made: for verify, --resume and people."""
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(record, indent=2) + "\n")


def clear(directory: str) -> None:
    """Removes step 0, and what earlier runs left of one that they did not finish.

    `problems` must have found nothing in the way. Whenever it is interrupted, what remains is
    either the whole checkpoint or none, and is known as what a conversion left.
    """
    root = epath.Path(directory)
    # First of all, and without an identity: what is partly removed can be cleared, not resumed.
    leave_record(directory, UNFINISHED_WORDS, {})
    for path in root.glob(f"{UNFINISHED}*"):
        path.rmtree()
    withdraw(directory)
    (root / WORDS).unlink(missing_ok=True)
    for path in (root / UNFINISHED, root / STEP):
        if path.exists():
            path.rmtree()


def withdraw(directory: str) -> None:
    """Makes step 0, if there is one, an unfinished one, which nothing takes for a checkpoint."""
    step = epath.Path(directory) / STEP
    if "://" in directory:
        (step / _COMMITTED).unlink(missing_ok=True)
    elif step.exists():
        step.rename(step.with_name(UNFINISHED))


def _local_problems(directory: str, nbytes: int, overwrite: bool) -> Iterator[str]:
    step = Path(directory, STEP)
    there = _nearest(Path(directory))
    if not there.is_dir():
        yield f"{there} is a file; base_output_directory must be a directory."
        return
    try:
        tempfile.TemporaryFile(dir=there).close()  # has no name: nobody ever sees it
        old = [
            path for path in (step, *step.parent.glob(f"{UNFINISHED}*")) if os.path.lexists(path)
        ]
        names = {path.name: _names(path) for path in old}
        free = shutil.disk_usage(there).free + sum(map(_nbytes, old))
    except OSError as error:
        yield f"{there} cannot be written to ({error.strerror}); name another directory."
        return
    for path in (Path(directory, WORDS), Path(directory, UNFINISHED_WORDS)):
        if os.path.lexists(path) and not path.is_file():
            yield f"{path} is no file, but maxconv writes one there; remove it."
    has_record = Path(directory, UNFINISHED_WORDS).is_file()
    yield from _not_to_delete(directory, names, step.name in names, has_record, overwrite)
    needed = int(nbytes * 1.01) + (1 << 20)  # what Orbax and the file system add
    if free < needed:
        yield (
            f"{there} has {size(free)} free, but the checkpoint takes {size(needed)}; make room, "
            "or name another directory."
        )


def scratch_problems(directory: str, nbytes: int) -> list[str]:
    """Why `nbytes` cannot lie for a while in a directory on disk, in sentences."""
    there = _nearest(Path(directory))
    try:
        tempfile.TemporaryFile(dir=there).close()
        free = shutil.disk_usage(there).free
    except OSError as error:
        return [f"{there} cannot be written to ({error.strerror}); set HF_HOME."]
    if free >= nbytes:
        return []
    return [
        f"{there} has {size(free)} free, but what is on its way to the Hub takes {size(nbytes)} "
        "there; make room, set HF_HOME, or give less --max_host_memory_gb."
    ]


def _bucket_problems(directory: str, nbytes: int, overwrite: bool) -> Iterator[str]:
    del nbytes  # a bucket has room for any number of them
    if not directory.startswith("gs://"):
        yield f"{directory} is no place to write to; give a directory, or gs://BUCKET/DIRECTORY."
        return
    from maxconv.sources import bucket as gcs

    try:
        bucket, _, path = directory.removeprefix("gs://").rstrip("/").partition("/")
        gcs.Bucket(bucket).check_writable(path)
        objects = gcs.Bucket(bucket).objects(path and f"{path}/")
    except gcs.Refused as error:
        yield str(error)
        return
    except RetryableError:
        raise
    except Exception as error:  # those of the network, of the account, and of their libraries
        why = str(error).partition("\n")[0] or type(error).__name__
        yield f"{directory} cannot be reached ({why}); check its name and your access to it."
        return
    names: dict[str, set[str]] = {}
    for name in objects:
        first, _, rest = name.partition("/")
        if first == STEP or first.startswith(UNFINISHED):
            names.setdefault(first, set()).add(rest)
    is_finished = _COMMITTED in names.get(STEP, ())
    has_record = UNFINISHED_WORDS in objects
    yield from _not_to_delete(directory.rstrip("/"), names, is_finished, has_record, overwrite)


def _not_to_delete(
    directory: str,
    names: Mapping[str, Set[str]],
    is_finished: bool,
    has_record: bool,
    overwrite: bool,
) -> Iterator[str]:
    """What lies where a conversion would clear, and is not for it to delete, in sentences.

    Args:
        names: of step 0, and of what may be unfinished ones: what is in each, `/` between names;
            those of `_names` if it is no directory.
        is_finished: the step is one.
        has_record: a conversion that was cut off left its record.
        overwrite: a checkpoint may be replaced.
    """
    for name, inside in sorted(names.items()):
        path = f"{directory}/{name}"
        if name == STEP and is_finished:
            if not overwrite:
                yield f"{path} exists; add --overwrite to replace it, or name another directory."
            elif inside and inside.isdisjoint(_MARKS):
                yield (
                    f"{path} is no checkpoint, so --overwrite leaves it alone; remove it, or name "
                    "another directory."
                )
            continue
        foreign = sorted(map(_foreign, inside)) if has_record else [""]
        if not has_record or any(foreign):
            what = "/".join(filter(None, (path, foreign[-1])))
            yield (
                f"{what} was not written by maxconv, which leaves it alone; remove it, or name "
                "another directory."
            )


def _foreign(name: str) -> str:
    """The name in a step, or as much of it as no save makes; empty if one does."""
    first, _, rest = name.partition("/")
    if not _IN_STEP.match(first):
        return first
    second = rest.partition("/")[0]
    is_foreign = first.startswith("items") and second and not _IN_ITEMS.match(second)
    return f"{first}/{second}" if is_foreign else ""


def _names(path: Path) -> set[str]:
    """What is in a directory, two levels of it, as in names of objects."""
    if path.is_symlink() or not path.is_dir():
        return {"/"}  # a name that nothing has
    below = [*path.iterdir()]
    deeper = [p for b in below if b.is_dir() and not b.is_symlink() for p in b.iterdir()]
    return {p.relative_to(path).as_posix() for p in (*below, *deeper)}


def _nearest(path: Path) -> Path:
    """The path itself, or the first directory above it that exists."""
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def _nbytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
