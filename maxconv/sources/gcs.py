"""Checkpoints in a Google Cloud Storage bucket, read without downloading the files."""

from collections.abc import Mapping

from maxconv.errors import UserError
from maxconv.sources import bucket as gcs
from maxconv.sources.remote import RemoteSource, told
from maxconv.sources.safetensors import some


class GcsSource(RemoteSource):
    """The objects below `gs://bucket/path`, at the generations they have when it is opened.

    Reading fails if an object is replaced or removed meanwhile.

    Raises:
        UserError: there is no checkpoint there, or it may not be read.
    """

    def __init__(self, path: str, max_retries: int, config: str = "config.json"):
        super().__init__(max_retries)
        bucket, _, directory = path.removeprefix("gs://").rstrip("/").partition("/")
        if not bucket:
            raise UserError(f"{path} names no bucket; expected gs://BUCKET/DIRECTORY.")
        self.root, self.revision = path.rstrip("/"), None
        self._bucket, self._prefix = gcs.Bucket(bucket, max_retries), directory and f"{directory}/"
        with told():
            self._objects = self._bucket.objects(self._prefix)
        if not self._objects:
            raise UserError(
                f"{self.root} holds no objects; give the directory of a checkpoint "
                f"(`gcloud storage ls gs://{bucket}` lists the bucket)."
            )
        self._examine(config, self._unfinished())

    def _names(self) -> set[str]:
        return {name for name in self._objects if "/" not in name}

    def _unfinished(self) -> list[str]:
        """A problem if unfinished downloads of huggingface_hub were copied here."""
        found = sorted(name for name in self._objects if name.endswith(".incomplete"))
        if not found:
            return []
        return [
            f"{self.root} holds unfinished downloads ({some(found)}); run `hf "
            "download` and copy it again, or delete them."
        ]

    def _size(self, file: str) -> int:
        if file not in self._objects:
            raise UserError(f"{file} in {self.root} does not exist; copy it there first.")
        return self._objects[file].size

    def _location(self, file: str, is_stale: bool) -> tuple[str, Mapping[str, str]]:
        generation = self._objects[file].generation
        return self._bucket.media(f"{self._prefix}{file}", generation, renew=is_stale)

    def _refusal(self, file: str, status: int) -> str | None:
        if status in (404, 412):
            return self._changed(file)
        return self._bucket.refusal(status)

    def _is_same(self, file: str, headers: Mapping[str, str]) -> bool:
        generation = self._objects[file].generation
        return headers.get("X-Goog-Generation", generation) == generation

    def versions(self) -> dict[str, str]:
        """The generation of every file that has tensors."""
        return {file: f"generation {self._objects[file].generation}" for file in self.files}
