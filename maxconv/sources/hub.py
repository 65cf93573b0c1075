"""Models on the Hugging Face Hub, without a download."""

import os
from collections.abc import Mapping
from threading import Lock
from urllib.parse import urljoin, urlsplit

from huggingface_hub import HfApi, constants, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from maxconv.errors import RetryableError, UserError
from maxconv.sources.files import FileSource
from maxconv.sources.http import RETRIED, Fault
from maxconv.sources.local import LocalSource
from maxconv.sources.remote import RemoteSource, Span, spans

_TOKENS = ("HF_TOKEN", "HF_AUTH_TOKEN")  # the latter is what MaxText's documents name
_NETWORK = ("httpx", "requests", "urllib3")  # what releases of huggingface_hub ask with
_WANTED = ("*.json", "*.safetensors")


def open_hub(
    name: str, revision: str | None, token: str | None, max_retries: int, cache: bool, config: str
) -> FileSource:
    """A model of the Hub; see `open_source`.

    With `cache`, or when HF_HUB_OFFLINE is set, it is that of the Hugging Face cache.
    """
    token = find_token(token)
    if not (cache or constants.HF_HUB_OFFLINE):
        return HubSource(name, revision, token, max_retries, config)
    try:
        path = snapshot_download(
            name, revision=revision, token=token or False, allow_patterns=list(_WANTED)
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids to ask the Hub: "
            f"run `hf download {name}` where there is a network."
        ) from None
    except Exception as error:
        raise told(error, name, revision, token) from None
    return LocalSource(path, config)


def find_token(given: str | None) -> str | None:
    """The token for the Hub: the one that was given, of the environment, or of `hf auth login`."""
    return given or next((os.environ[k] for k in _TOKENS if os.environ.get(k)), None) or get_token()


class HubSource(RemoteSource):
    """A model at one commit, which is that of `revision` (or main) when it is opened.

    The Hub itself is asked once for each file where it lies; the ranges come from there. The token
    goes to the Hub's own host and to no other.

    Without a `config` it is not looked at as a model: its files are there to `fetch` from.

    Raises:
        UserError: when there is no such model or revision, or it may not be read.
    """

    def __init__(
        self,
        name: str,
        revision: str | None,
        token: str | None,
        max_retries: int,
        config: str | None = "config.json",
    ):
        super().__init__(max_retries)
        self.root = f"hf://{name}"
        self._name, self._headers = name, build_hf_headers(token=token or False)
        self._resolving, self._etags = Lock(), dict[str, str]()
        self._locations = dict[str, tuple[str, Mapping[str, str]]]()
        api = HfApi(token=token or False)
        try:
            api.auth_check(name)
            info = api.model_info(name, revision=revision, files_metadata=True)
        except Exception as error:
            raise told(error, name, revision, token) from None
        self.revision = info.sha
        self._sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if config is not None:
            self._examine(config)

    def fetch(self, file: str, start: int, into: memoryview) -> None:
        """Fills a buffer from byte `start` of a file."""

        def bring(span: Span) -> None:
            first, stop, _ = span
            self._get(file, first, into[first - start : stop - start])

        for _ in self._pool.map(bring, spans([start], len(into))):
            pass

    def _names(self) -> set[str]:
        return set(self._sizes)

    def _size(self, file: str) -> int:
        if file not in self._sizes:
            raise UserError(f"{file} in {self.root} does not exist at revision {self.revision}.")
        return self._sizes[file]

    def _location(self, file: str, is_stale: bool) -> tuple[str, Mapping[str, str]]:
        with self._resolving:
            if is_stale:
                self._locations.pop(file, None)
            if file not in self._locations:
                self._locations[file] = self._resolved(file)
            return self._locations[file]

    def _resolved(self, file: str) -> tuple[str, Mapping[str, str]]:
        """Where the Hub sends us for a file; small ones it gives itself."""
        url = hf_hub_url(self._name, file, revision=self.revision)
        answer = self._http.request("HEAD", url, headers=self._headers, redirect=False)
        if answer.status in RETRIED:
            raise Fault.of(answer)
        etag = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
        if answer.status >= 400 or etag != self._etags.setdefault(file, etag):
            raise OSError(self._changed(file))
        there = answer.headers.get("Location")
        if there is None:
            return url, self._headers
        there = urljoin(url, there)
        is_same = urlsplit(there).netloc == urlsplit(url).netloc
        return there, self._headers if is_same else {}

    def versions(self) -> dict[str, str]:
        """The commit, of which all files are."""
        return {self.root: f"commit {self.revision}"}


def told(error: Exception, name: str, revision: str | None, token: str | None) -> Exception:
    """What keeps us from a model, in a sentence that says what to do, if we know."""
    page = f"{constants.ENDPOINT}/{name}"
    match error:
        case GatedRepoError() if token:
            return UserError(f"{name} is gated and this token has no access: ask for it at {page}.")
        case GatedRepoError():
            return UserError(f"{name} is gated: ask for access at {page}, then set HF_TOKEN.")
        case RepositoryNotFoundError() if token:
            return UserError(
                f"{name} is not on the Hub, or private and not for this token: check both."
            )
        case RepositoryNotFoundError():
            return UserError(f"{name} is not on the Hub, or private: check it, or set HF_TOKEN.")
        case RevisionNotFoundError():
            return UserError(f"{name} has no revision {revision}: see {page}/tree/main.")
        case HfHubHTTPError(response=response) if response.status_code == 401:
            return UserError(
                "The Hub does not accept the token: make one at "
                f"{constants.ENDPOINT}/settings/tokens, or unset HF_TOKEN."
            )
        case HfHubHTTPError(response=response) if response.status_code == 403:
            return UserError(
                f"The token may not read {name}: see what it is for at "
                f"{constants.ENDPOINT}/settings/tokens."
            )
        case HfHubHTTPError(response=response):
            return RetryableError(f"The Hub answered {response.status_code} about {name}.")
        case _ if isinstance(error, OSError) or type(error).__module__.startswith(_NETWORK):
            why = type(error).__name__
            return RetryableError(
                f"The Hub cannot be reached ({why}): try again, or run `hf download {name} "
                "--local-dir DIR` where it can be and give DIR."
            )
        case _:
            return error
