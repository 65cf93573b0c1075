"""A repository on the Hugging Face Hub that a job writes to, in one commit."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from functools import partial
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.utils import disable_progress_bars, logging

from maxconv.errors import ConversionError, RetryableError, UserError
from maxconv.private.huggingface_hub import is_uploaded, nbytes
from maxconv.sources.hub import HubSource, ask, find_token, told

T = TypeVar("T")

SCHEME = "hf://"
RETRIES = 5  # of requests before anything is written


def is_repository(where: str) -> bool:
    """Whether a base_output_directory is a repository on the Hub."""
    return where.startswith(SCHEME)


def repository_name(place: str) -> str:
    return place.removeprefix(SCHEME).rstrip("/")


class Repository:
    """A repository, of which a job replaces some files.

    Attributes:
        name: `org/name`.

    Args:
        place: `hf://org/name`.
        token: for the Hub; default as in `find_token`.
        max_retries: of a failed request.
        public: whether it is made public, if it is created.
        overwrite: whether files that are there when the job begins may be replaced.
        replaces: tells which files of the repository, by path, the job replaces.
        deletes: tells which of these are deleted if the job has no new ones of their names; all by
            default.
    """

    def __init__(
        self,
        place: str,
        token: str | None,
        max_retries: int,
        public: bool,
        overwrite: bool,
        replaces: Callable[[str], bool],
        deletes: Callable[[str], bool] = lambda file: True,
    ):
        self.name, self._public, self._retries = repository_name(place), public, max_retries
        self._overwrite, self._replaces, self._deletes = overwrite, replaces, deletes
        self._replaced, self._has_sent = set[str](), False
        self.token = find_token(token)
        self._api = HfApi(token=self.token)
        disable_progress_bars()
        logging.set_verbosity_error()  # its warnings contain signed URLs

    def problems(self) -> list[str]:
        """Everything that prevents a commit there, in sentences; changes nothing on the Hub."""
        place = f"{SCHEME}{self.name}"
        if not re.fullmatch(r"[\w-][\w.-]*/\w[\w.-]*", self.name):
            return [f"{place} is not of the form hf://org/name."]
        if constants.HF_HUB_OFFLINE:
            return [f"HF_HUB_OFFLINE forbids writing to {place}; unset it, or name a directory."]
        if self.token is None:
            return [f"Writing to {place} needs a token; set HF_TOKEN, or run `hf auth login`."]
        try:
            return ask(self.name, RETRIES, lambda: list(self._problems()))
        except Exception as error:
            error = _refused(error, self.name, self.token)
            if not isinstance(error, UserError):
                raise error from None
            return list(error.problems)

    def _problems(self) -> Iterator[str]:
        me = self._api.whoami()
        try:
            info = self._api.model_info(self.name)
        except RepositoryNotFoundError:
            if (problem := _no_place(me, self.name.partition("/")[0])) is not None:
                yield problem
            return
        self._ask_to_write()
        if info.private and self._public:
            yield (
                f"{SCHEME}{self.name} exists and is private; make it public in its settings, or "
                "remove --public."
            )
        if not self._overwrite and (there := self._there(info)):
            yield self._exists(there)

    def create(self) -> list[str]:
        """Creates the repository if it does not exist; returns notices for the user.

        Raises:
            UserError: it has files that may not be replaced.
        """
        is_public = self._persistently(self._create)
        return [f"{SCHEME}{self.name} is public."] if is_public and not self._public else []

    def _create(self) -> bool:
        """Returns whether it is public."""
        self._api.create_repo(self.name, private=not self._public, exist_ok=True)
        self._ask_to_write()
        info = self._api.model_info(self.name)
        self._replaced = self._there(info)
        if self._replaced and not self._overwrite:  # it came since it was looked at before
            raise UserError(self._exists(self._replaced))
        return not info.private

    def upload(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Uploads large files, for a later commit."""
        size = sum(map(nbytes, additions))
        self._persistently(partial(self._api.preupload_lfs_files, self.name, additions), size)
        for addition in additions:
            if not is_uploaded(addition):
                raise ConversionError(
                    f"{SCHEME}{self.name} does not accept {addition.path_in_repo} as a large file; "
                    "check its .gitattributes."
                )

    def commit(self, additions: Sequence[CommitOperationAdd], what: str) -> str:
        """Replaces what was there at the beginning in one commit, and returns its id.

        Raises:
            ConversionError: files were added that this job may not delete; or the repository does
                not contain what was sent.
        """
        sizes = {addition.path_in_repo: nbytes(addition) for addition in additions}
        message = f"{what}, {len(sizes)} files, by maxconv"
        made = self._persistently(lambda: self._commit(additions, sizes.keys(), message))
        self._look(made, sizes)
        return made

    def _commit(
        self, additions: Sequence[CommitOperationAdd], files: Set[str], message: str
    ) -> str:
        """Each attempt is for the repository as it was looked at, or the Hub refuses it (412)."""
        for attempt in range(RETRIES):
            info = self._api.model_info(self.name)
            there, new = self._there(info), files - self._replaced
            if self._has_sent and new and info.sha and new <= there:  # only the answer was lost
                return info.sha
            if came := sorted(there - self._replaced):
                raise ConversionError(
                    f"{SCHEME}{self.name}/{came[0]} and {len(came) - 1} more files were added by "
                    "someone else meanwhile, so the checkpoint was not committed; use another "
                    "repository, or remove these files and run the same command again."
                )
            stale = sorted(filter(self._deletes, there - files))
            self._has_sent = True
            try:
                return self._api.create_commit(
                    self.name,
                    [*map(CommitOperationDelete, stale), *additions],
                    commit_message=message,
                    parent_commit=info.sha,
                ).oid
            except HfHubHTTPError as error:
                if error.response.status_code != 412 or attempt == RETRIES - 1:
                    raise
        raise AssertionError("every attempt returns or raises")

    def at(self, commit: str) -> HubSource:
        """The files at a commit, to be read."""
        return HubSource(self.name, commit, self.token, self._retries, config=None)

    def _look(self, commit: str, sizes: Mapping[str, int]) -> None:
        info = self._persistently(
            lambda: self._api.model_info(self.name, revision=commit, files_metadata=True)
        )
        there = {file.rfilename: file.size for file in info.siblings or ()}
        if wrong := sorted(file for file, size in sizes.items() if there.get(file) != size):
            raise ConversionError(
                f"{SCHEME}{self.name} has {wrong[0]} and {len(wrong) - 1} more files that differ "
                "from what was sent; check its .gitignore, and run the same command again."
            )

    def _there(self, info: Any) -> set[str]:
        """The files that the job replaces."""
        return {file.rfilename for file in info.siblings or () if self._replaces(file.rfilename)}

    def _exists(self, there: Set[str]) -> str:
        return (
            f"{SCHEME}{self.name}/{min(there).partition('/')[0]} exists; add --overwrite to "
            "replace it, or name another repository."
        )

    def _ask_to_write(self) -> None:
        """Checks write access, with a request for the upload mode of a file."""
        self._api.preupload_lfs_files(self.name, [CommitOperationAdd("0/_", b"{}")])

    def _persistently(self, action: Callable[[], T], nbytes: int = 0) -> T:
        """Makes a request with retries; `nbytes`: bytes that it uploads, for its timeout."""
        try:
            return ask(self.name, self._retries, action, nbytes)
        except Exception as error:
            raise _refused(error, self.name, self.token) from None


def _no_place(me: Mapping[str, Any], org: str) -> str | None:
    """Why this user cannot create a repository, as far as that is known in advance."""
    if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return _may_not_write(f"{SCHEME}{org}")
    mine = [me.get("name"), *(o["name"] for o in me.get("orgs", ()) if _writes_in(o))]
    return None if org in mine else _may_not_write(f"{SCHEME}{org}")


def _writes_in(org: Mapping[str, Any]) -> bool:
    return org.get("roleInOrg") != "read"


def _answer(error: BaseException | None) -> HfHubHTTPError | None:
    """The Hub's answer that caused an error, if any."""
    while error is not None and not isinstance(error, HfHubHTTPError):
        error = error.__cause__
    return error


def _refused(error: Exception, name: str, token: str | None) -> Exception:
    """A known error of writing as a sentence; an unknown one unchanged."""
    answer = _answer(error)
    if answer is not None and answer.response.status_code == 403:
        return UserError(_may_not_write(f"{SCHEME}{name}"))
    said = told(answer or error, name, None, token)
    if said is error and isinstance(error, RuntimeError):
        return RetryableError(f"The upload to {name} failed ({error}); try again.")
    return said


def _may_not_write(place: str) -> str:
    return (
        f"The token has no write access to {place}; create one that has at "
        f"{constants.ENDPOINT}/settings/tokens, or name a repository of your own."
    )
