"""An export to a repository on the Hugging Face Hub, in one commit."""

from pathlib import Path

import jax
from huggingface_hub import CommitOperationAdd

from maxconv.private.huggingface_hub import Uploaded, described, uploaded
from maxconv.processes.agreement import gathered, same_error_everywhere
from maxconv.sources import FileSource, open_source
from maxconv.targets import publication
from maxconv.targets.export_staged import StagedExport
from maxconv.targets.repository import Repository
from maxconv.targets.shards import Contents, File, is_weights


class HubExport(StagedExport):
    """Each process uploads its files; process 0 commits those of all."""

    def __init__(
        self,
        where: str,
        contents: Contents,
        overwrite: bool,
        token: str | None,
        max_retries: int,
        public: bool,
    ):
        super().__init__(where, contents, overwrite)
        self._token, self._max_retries = token, max_retries
        self._repository = Repository(
            where, token, max_retries, public, overwrite, contents.replaces, is_weights
        )
        self._uploads: list[Uploaded] = []
        self._made = ""  # the id of the commit

    @property
    def lock(self) -> str:
        return f"{publication.scratch(self.place)}.lock"  # also that of a conversion to there

    def problems(self) -> list[str]:
        return self._repository.problems()

    def _prepare(self) -> tuple[str, ...]:
        notices: list[str] = []
        with same_error_everywhere():
            if jax.process_index() == 0:
                notices = self._repository.create()
        return tuple(notices)

    def _send(self, file: File, path: Path) -> None:
        addition = CommitOperationAdd(file.name, str(path))
        self._repository.upload([addition])
        self._uploads.append(described(addition))

    def commit(self) -> None:
        self._uploads = [Uploaded(*it) for each in gathered(self._uploads) for it in each]
        super().commit()

    def _commit(self) -> None:
        small = self.contents.small.items()
        additions = [CommitOperationAdd(name, content) for name, content in small]
        additions += map(uploaded, self._uploads)
        self._made = self._repository.commit(additions, "Hugging Face checkpoint")

    def opened(self) -> FileSource:
        commit = gathered(self._made)[0]
        return open_source(
            self.place,
            token=self._token,
            config=self.contents.config,
            max_retries=self._max_retries,
            commit=commit,
        )
