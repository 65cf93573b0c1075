"""Models on the Hugging Face Hub, read without downloading the files."""

import glob
import os
from collections.abc import Callable, Mapping
from threading import Lock
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import build_hf_headers

from maxconv.errors import ConversionError, RetryableError, UserError
from maxconv.sources import http
from maxconv.sources.files import FileSource
from maxconv.sources.http import Fault, patiently, redirected, same_origin, within
from maxconv.sources.local import LocalSource
from maxconv.sources.remote import RemoteSource, Span, spans

_TOKENS = ("HF_TOKEN", "HF_AUTH_TOKEN")  # the latter is what MaxText's documents name
_NETWORK = ("httpx", "requests", "urllib3")  # HTTP clients of releases of huggingface_hub
_MOST_REDIRECTS = 5  # of the Hub itself

Answer = TypeVar("Answer")


def open_hub(
    name: str, revision: str | None, token: str | None, max_retries: int, cache: bool, config: str
) -> FileSource:
    """A model on the Hub; see `open_source`.

    With `cache`, or if HF_HUB_OFFLINE is set, it is read from the Hugging Face cache.
    """
    token = find_token(token)
    if not (cache or constants.HF_HUB_OFFLINE):
        return HubSource(name, revision, token, max_retries, config)
    try:
        if not constants.HF_HUB_OFFLINE:
            return LocalSource(_downloaded(name, revision, token, max_retries, config), config)
        path = snapshot_download(
            name, revision=revision, token=token or False, allow_patterns=glob.escape(config)
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{name} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids access to the "
            f"Hub; run `hf download {name}` with network access first."
        ) from None
    except Exception as error:
        raise told(error, name, revision, token) from None
    return LocalSource(path, config)


def _downloaded(
    name: str, revision: str | None, token: str | None, max_retries: int, config: str
) -> str:
    """The directory in the Hugging Face cache, with those files of a model that are read."""
    with HubSource(name, revision, token, max_retries, config) as there:
        wanted = [glob.escape(file) for file in there.read_files]
    return snapshot_download(name, revision=revision, token=token or False, allow_patterns=wanted)


def find_token(given: str | None) -> str | None:
    """The token for the Hub: as given, from the environment, or from `hf auth login`."""
    return given or next((os.environ[k] for k in _TOKENS if os.environ.get(k)), None) or get_token()


class HubSource(RemoteSource):
    """A model at one commit: that of `revision` (or main) when it is opened.

    The Hub itself is asked once per file for its location; ranges are then read from there. The
    token is sent to the Hub's own scheme, host and port only.

    Without a `config` it is not opened as a model: only `fetch` can be used.

    Raises:
        UserError: there is no such model or revision, or it may not be read.
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
            ask(name, max_retries, lambda: api.auth_check(name), mend=_mend(name))
            info = ask(
                name,
                max_retries,
                lambda: api.model_info(name, revision=revision, files_metadata=True),
                mend=_mend(name),
            )
            self.revision, self._sizes = _commit(info)
        except Exception as error:
            raise told(error, name, revision, token) from None
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
        """The URL and request headers of a file; the Hub serves small files itself.

        Redirects within the Hub are followed (renamed models); a redirect to another host is the
        location of the file, and its headers have the file's ETag.
        """
        url = hf_hub_url(self._name, file, revision=self.revision)
        for _ in range(_MOST_REDIRECTS):
            answer, _ = self._http.data("HEAD", url, self._headers)
            if answer.status in http.RETRIED:
                raise Fault.of(answer.status, answer.headers)
            there = redirected(url, answer)
            if there is None or not same_origin(url, there):
                etag = answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag") or ""
                if answer.status >= 400 or etag != self._etags.setdefault(file, etag):
                    raise OSError(self._changed(file))
                return (url, self._headers) if there is None else (there, {})
            url = there
        raise OSError(f"the Hub redirects more than {_MOST_REDIRECTS} times for {file}")

    def versions(self) -> dict[str, str]:
        """The commit, which pins all files."""
        return {self.root: f"commit {self.revision}"}


def ask(
    name: str,
    max_retries: int,
    call: Callable[[], Answer],
    nbytes: int = 0,
    mend: str = http.AGAIN,
) -> Answer:
    """Makes an API call about a model, with retries; returns its result.

    Args:
        name: the model.
        max_retries: attempts after the first.
        call: the call; an attempt that timed out may still be running in another thread.
        nbytes: bytes that it uploads, which extend its timeout.
        mend: the end of the error message: what to do.

    Raises:
        RetryableError: the Hub fails, is too busy, or cannot be reached.
        Exception: any other error of the call.
    """

    def attempt(is_stale: bool) -> Answer:
        try:
            return within(http.CALL + nbytes / http.UPLOAD, call)
        except Exception as error:
            if (fault := _fault(error)) is not None:
                raise fault from error
            raise

    return patiently(f"A request to the Hub about {name} failed", max_retries, attempt, mend)


def _fault(error: BaseException | None) -> Fault | None:
    """The transient failure behind an error of huggingface_hub; None if it is not transient."""
    while error is not None:
        match error:
            case HfHubHTTPError(response=response):
                if response.status_code in http.RETRIED or response.status_code >= 500:
                    return Fault.of(response.status_code, response.headers)
                return None
            case ConversionError() | FileNotFoundError():
                return None
            case _ if _is_of_network(error):
                return Fault(f"the connection failed ({type(error).__name__})")
        error = error.__cause__
    return None


def _is_of_network(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.startswith(_NETWORK)


def _commit(info: ModelInfo) -> tuple[str, dict[str, int]]:
    """The commit that an answer describes, and the sizes of its files.

    Raises:
        ValueError: the answer is malformed.
    """
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    for name, size in sizes.items():
        if not isinstance(name, str) or type(size) is not int or size < 0:
            raise ValueError(f"{name!r} of {size!r} bytes")
    if not isinstance(info.sha, str):
        raise ValueError(f"commit {info.sha!r}")
    return info.sha, sizes


def _mend(name: str) -> str:
    return (
        f"try again, or run `hf download {name} --local-dir DIR` where the Hub can be reached and "
        "pass --hf_model_path=DIR"
    )


def told(error: Exception, name: str, revision: str | None, token: str | None) -> Exception:
    """A known error as a sentence that says what to do; an unknown one unchanged."""
    page = f"{constants.ENDPOINT}/{name}"
    match error:
        case GatedRepoError() if token:
            return UserError(f"{name} is gated and this token has no access; request it at {page}.")
        case GatedRepoError():
            return UserError(f"{name} is gated; request access at {page}, then set HF_TOKEN.")
        case RepositoryNotFoundError() if token:
            return UserError(
                f"{name} is not on the Hub, or is private and this token has no access; check both."
            )
        case RepositoryNotFoundError():
            return UserError(
                f"{name} is not on the Hub, or is private; check the name, or set HF_TOKEN."
            )
        case RevisionNotFoundError():
            return UserError(f"{name} has no revision {revision}; see {page}/tree/main.")
        case HfHubHTTPError(response=response) if response.status_code == 401:
            return UserError(
                "The Hub does not accept the token; create one at "
                f"{constants.ENDPOINT}/settings/tokens, or unset HF_TOKEN."
            )
        case HfHubHTTPError(response=response) if response.status_code == 403:
            return UserError(
                f"The token has no read access to {name}; see its permissions at "
                f"{constants.ENDPOINT}/settings/tokens."
            )
        case HfHubHTTPError(response=response):
            return RetryableError(f"The Hub answered {response.status_code} about {name}.")
        case ConversionError():
            return error
        case HFValidationError():
            return UserError(f"{name} is not a valid name of a model on the Hub: {error}")
        case ValueError() | TypeError() | LookupError() | AttributeError():
            return UserError(
                f"The answer about {name} is malformed ({error!r}); check that HF_ENDPOINT, "
                f"{constants.ENDPOINT}, is a Hub."
            )
        case _ if _is_of_network(error):
            why = type(error).__name__
            return RetryableError(f"The Hub cannot be reached ({why}); {_mend(name)}.")
        case _:
            return error
