"""Where an export goes."""

import json
import os
from collections.abc import Mapping, Sequence

from etils import epath

from maxconv.config import Config
from maxconv.errors import UserError
from maxconv.jobs.export_record import record
from maxconv.targets import place
from maxconv.targets.export_bucket import BucketExport
from maxconv.targets.export_directory import DirectoryExport
from maxconv.targets.export_hub import HubExport
from maxconv.targets.export_target import ExportTarget
from maxconv.targets.repository import is_repository
from maxconv.targets.shards import Contents, File


def target_of(
    config: Config, checkpoint: str, files: Sequence[File], others: Mapping[str, bytes]
) -> ExportTarget:
    """The target that base_output_directory names.

    Args:
        config: of the export.
        checkpoint: the tree of parameters that is exported, which is recorded beside the files.
        files: of weights.
        others: the contents of the small files beside them.

    Raises:
        UserError: it is no place that can be written to.
    """
    where, overwrite, retries = config.base_output_directory, config.overwrite, config.max_retries
    if is_repository(where):  # a record would publish paths of this machine
        token, public = config.hf_access_token, config.public
        return HubExport(where, Contents(files, others), overwrite, token, retries, public)
    made_of = json.dumps(record(config.words, checkpoint), indent=2) + "\n"
    contents = Contents(files, {**others, place.WORDS: made_of.encode()})
    if where.startswith("gs://"):
        return BucketExport(where, contents, overwrite, retries)
    if "://" in where:
        raise UserError(
            f"{where} is not supported; give a directory, gs://bucket/path or hf://org/name."
        )
    return DirectoryExport(where, contents, overwrite)


def check_place(target: ExportTarget, model: str) -> None:
    """Raises UserError if an export would replace the model that its names are taken from, or go
    into a checkpoint of MaxText."""
    where = target.place
    if where == model or (
        "://" not in where and os.path.realpath(where) == os.path.realpath(model)
    ):
        raise UserError(f"{where} is the model that names are taken from; name another place.")
    if is_repository(where):
        return
    if any((epath.Path(where) / name).exists() for name in (place.STEP, place.UNFINISHED_WORDS)):
        raise UserError(f"{where} is for a MaxText checkpoint; name another base_output_directory.")
