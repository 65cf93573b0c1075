"""Models on the Hugging Face Hub, without a download."""

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
_NETWORK = ("httpx", "requests", "urllib3")  # what releases of huggingface_hub ask with
_WANTED = ("*.json", "*.safetensors")
_MOST_REDIRECTS = 5  # of the Hub itself

Answer = TypeVar("Answer")


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
            f"{name} is not in the Hugging Face cache, and HF_HUB_OFFLINE forbids asking the Hub: "
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
    goes to the Hub's own scheme, host and port, and nowhere else.

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
        """Where the Hub sends us for a file; small ones it gives itself.

        Redirects within the Hub are followed (a model that was renamed); one that leaves it is
        where the file is, and what is known of the file comes with it.
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
        """The commit, of which all files are."""
        return {self.root: f"commit {self.revision}"}


def ask(
    name: str,
    max_retries: int,
    call: Callable[[], Answer],
    nbytes: int = 0,
    mend: str = http.AGAIN,
) -> Answer:
    """What a call of the Hub's API about a model returns, tried again while that may help.

    Args:
        name: of the model.
        max_retries: attempts after the first.
        call: what to do; other threads may still be in an attempt that took too long.
        nbytes: that it uploads, which prolongs the time that it has.
        mend: what to do when nothing helps.

    Raises:
        RetryableError: the Hub fails, is too busy, or cannot be reached.
        Exception: what the call raises otherwise.
    """

    def attempt(is_stale: bool) -> Answer:
        try:
            return within(http.CALL + nbytes / http.UPLOAD, call)
        except Exception as error:
            if (fault := _fault(error)) is not None:
                raise fault from error
            raise

    return patiently(f"The Hub could not be asked about {name}", max_retries, attempt, mend)


def _fault(error: BaseException | None) -> Fault | None:
    """What may pass, of an error of huggingface_hub or what it came of; None if nothing may."""
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
    """The commit that an answer is about, and the sizes of its files.

    Raises:
        ValueError: it does not say.
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
        "give DIR"
    )


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
        case ConversionError():
            return error
        case HFValidationError():
            return UserError(f"{name} is no name of a model on the Hub: {error}")
        case ValueError() | TypeError() | LookupError() | AttributeError():
            return UserError(
                f"The answer about {name} makes no sense ({error!r}): is there a Hub at "
                f"{constants.ENDPOINT}?"
            )
        case _ if _is_of_network(error):
            why = type(error).__name__
            return RetryableError(f"The Hub cannot be reached ({why}): {_mend(name)}.")
        case _:
            return error
