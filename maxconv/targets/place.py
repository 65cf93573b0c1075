"""The place where a checkpoint goes: checked before, never half-written."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from maxconv.errors import RetryableError
from maxconv.text import size

STEP = "0"  # MaxText's converter writes step 0
WORDS = "maxconv.json"  # beside the step: how it was made
UNFINISHED_WORDS = "maxconv.unfinished.json"  # the same, of one that is not there yet
UNFINISHED = f"{STEP}.orbax-checkpoint-tmp"  # how Orbax' names of an unfinished step 0 begin
_COMMITTED = "commit_success.txt"  # makes a directory in a bucket, which has no renames, complete
_MARKS = {"_CHECKPOINT_METADATA", "items"}  # what a checkpoint of MaxText has


def items(directory: str) -> str:
    """Where MaxText finds the weights: its load_parameters_path."""
    return f"{directory.rstrip('/')}/{STEP}/items"


def is_there(directory: str) -> bool:
    """Whether there is a finished step, or on disks anything in its place."""
    step = epath.Path(directory) / STEP
    return ((step / _COMMITTED) if "://" in directory else step).exists()


def problems(directory: str, nbytes: int, overwrite: bool) -> list[str]:
    """What stands in the way of writing `nbytes` there, in sentences."""
    check = _bucket_problems if "://" in directory else _local_problems
    return list(check(directory, nbytes, overwrite))


def clear(directory: str) -> None:
    """Removes step 0, and what earlier runs left of one that they did not finish.

    Whenever it is interrupted, what remains is either the whole checkpoint or none.
    """
    root = epath.Path(directory)
    for path in root.glob(f"{UNFINISHED}*"):
        path.rmtree()
    step = root / STEP
    if step.exists():
        if "://" in directory:
            (step / _COMMITTED).unlink(missing_ok=True)
        else:
            step = step.rename(root / UNFINISHED)
    for words in (WORDS, UNFINISHED_WORDS):
        (root / words).unlink(missing_ok=True)
    if step.exists():
        step.rmtree()


def _local_problems(directory: str, nbytes: int, overwrite: bool) -> Iterator[str]:
    step = Path(directory, STEP)
    there = _nearest(Path(directory))
    if not there.is_dir():
        yield f"{there} is a file; base_output_directory must be a directory."
        return
    try:
        tempfile.TemporaryFile(dir=there).close()  # has no name: nobody ever sees it
        old = [path for path in (step, *step.parent.glob(f"{UNFINISHED}*")) if path.exists()]
        free = shutil.disk_usage(there).free + sum(map(_nbytes, old))
    except OSError as error:
        yield f"{there} cannot be written to ({error.strerror}); name another directory."
        return
    if step.is_symlink() or step.exists():
        if not overwrite:
            yield f"{step} exists; add --overwrite to replace it, or name another directory."
        elif not _is_checkpoint(step):
            yield (
                f"{step} is no checkpoint, so --overwrite leaves it alone; remove it, or name "
                "another directory."
            )
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
        step = epath.Path(directory) / STEP
        exists = (step / _COMMITTED).exists()
    except gcs.Refused as error:
        yield str(error)
        return
    except RetryableError:
        raise
    except Exception as error:  # those of the network, of the account, and of their libraries
        why = str(error).partition("\n")[0] or type(error).__name__
        yield f"{directory} cannot be reached ({why}); check its name and your access to it."
        return
    if exists and not overwrite:
        yield f"{step} exists; add --overwrite to replace it, or name another directory."


def _is_checkpoint(step: Path) -> bool:
    """Whether a directory is ours to remove: a checkpoint, or empty."""
    names = {path.name for path in step.iterdir()} if step.is_dir() else {""}
    return not step.is_symlink() and (not names or not names.isdisjoint(_MARKS))


def _nearest(path: Path) -> Path:
    """The path itself, or the first directory above it that exists."""
    return next(p for p in (path, *path.parents) if os.path.exists(p))


def _nbytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())
