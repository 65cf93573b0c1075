"""Google Cloud Storage through its JSON API: addresses, credentials, and what errors mean."""

import os
import uuid
from collections.abc import Mapping
from threading import Lock
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, urlencode

import google.auth
from google.auth import exceptions
from google.auth.credentials import AnonymousCredentials
from google.auth.transport.urllib3 import Request

from maxconv.errors import UserError
from maxconv.sources import http
from maxconv.sources.http import Fault, patiently
from maxconv.sources.safetensors import load_object

_EMULATOR = "STORAGE_EMULATOR_HOST"  # names a server on this machine, as Google's clients have it
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_write"
_READING = ("storage.objects.list", "storage.objects.get")
_READERS = "roles/storage.objectViewer"
_WRITERS = "roles/storage.objectAdmin and roles/storage.legacyBucketReader"


_MOST_PAGES = 1000  # of a listing: a million objects


class Refused(OSError):
    """A bucket or object that cannot be accessed, explained in a sentence."""


class Object(NamedTuple):
    """An object in a listing: size in bytes, and generation, which changes with the contents."""

    size: int
    generation: str


class Bucket:
    """A bucket, accessed with Application Default Credentials; safe to use from many threads."""

    def __init__(self, name: str, max_retries: int = 5):
        self.name, self._max_retries = name, max_retries
        host = os.environ.get(_EMULATOR, "")
        self._endpoint = host or "https://storage.googleapis.com"
        if "://" not in self._endpoint:
            self._endpoint = f"http://{host}"
        self._http, self._lock = http.Client(1), Lock()
        self._renewal = Request(self._http.pools)
        self._credentials = _credentials()

    def objects(self, prefix: str) -> dict[str, Object]:
        """Every object whose name begins with `prefix`, by the rest of its name.

        Raises:
            Refused: the bucket does not exist, or may not be read.
        """
        found: dict[str, Object] = {}
        query = {"prefix": prefix, "fields": "items(name,size,generation),nextPageToken"}
        for _ in range(_MOST_PAGES):
            page = self._ask("/o", query, _READING)
            found |= _objects(page, prefix)
            if not (token := page.get("nextPageToken")):
                return found
            query["pageToken"] = str(token)
        raise Refused(
            f"gs://{self.name}/{prefix} holds more than {len(found):,} objects; give the directory "
            "of a checkpoint"
        )

    def check_writable(self, directory: str) -> None:
        """Checks write access to a directory by creating and deleting an empty object there.

        The bucket's IAM policy is not enough: permissions may be granted for some directories only.
        TensorStore requests the bucket itself before it writes, hence storage.buckets.get.

        Raises:
            Refused: the bucket does not exist, or a permission that a save needs is missing.
        """
        self._ask("", {"fields": "name"}, ("storage.buckets.get",))
        prefix = directory and f"{directory}/"
        self._ask("/o", {"prefix": prefix, "maxResults": 1}, ("storage.objects.list",))
        probe = f"{prefix}maxconv.{uuid.uuid4().hex}"
        new = {"uploadType": "media", "name": probe}
        self._ask("/o", new, ("storage.objects.create",), "POST")
        self._ask(f"/o/{quote(probe, safe='')}", {}, ("storage.objects.delete",), "DELETE")

    def media(self, name: str, generation: str, renew: bool) -> tuple[str, Mapping[str, str]]:
        """The URL of an object's contents, and the request headers for it.

        Raises:
            Refused: the credentials are invalid.
            Fault: the token server cannot be reached.
        """
        query = {"alt": "media", "generation": generation}
        return self._url(f"/o/{quote(name, safe='')}", query), self._headers(renew)

    def refusal(self, status: int, rights: tuple[str, ...] = _READING) -> str | None:
        """The explanation of an error status that a retry would not help; None for any other."""
        match status:
            case 401 if isinstance(self._credentials, AnonymousCredentials):
                return (
                    f"gs://{self.name} is not public, and no Google credentials were found here; "
                    "run `gcloud auth application-default login`, or set "
                    "GOOGLE_APPLICATION_CREDENTIALS"
                )
            case 403:
                return self._without(rights)
            case 404:
                return f"There is no bucket gs://{self.name}; check its name, or create it"
            case _:
                return None

    def _without(self, rights: tuple[str, ...]) -> str:
        who = getattr(self._credentials, "service_account_email", None)
        return (
            f"{who or 'The account here'} lacks {', '.join(rights)} on gs://{self.name}; "
            f"grant it {_READERS if rights == _READING else _WRITERS}, and create TPU VMs "
            "with --scopes=cloud-platform"
        )

    def _ask(
        self,
        path: str,
        query: Mapping[str, Any],
        rights: tuple[str, ...],
        method: Literal["GET", "POST", "DELETE"] = "GET",
    ) -> dict[str, Any]:
        """The bucket's answer. A retried POST overwrites; a retried DELETE accepts 404."""

        def attempt(is_stale: bool) -> dict[str, Any]:
            url = self._url(path, query, upload=method == "POST")
            answer, body = self._http.data(method, url, self._headers(is_stale))
            if answer.status < 300 or (answer.status, method) == (404, "DELETE"):
                return _object(body) if method == "GET" else {}
            if answer.status in http.RETRIED:
                raise Fault.of(answer.status, answer.headers)
            if sentence := self.refusal(answer.status, rights):
                raise Refused(sentence)
            raise Fault.of(answer.status, answer.headers, is_stale=answer.status == 401)

        return patiently(f"A request to gs://{self.name} failed", self._max_retries, attempt)

    def _url(self, path: str, query: Mapping[str, Any], upload: bool = False) -> str:
        api = f"{self._endpoint}{'/upload' * upload}/storage/v1"
        return f"{api}/b/{self.name}{path}?{urlencode(query)}"

    def _headers(self, renew: bool) -> dict[str, str]:
        headers: dict[str, str] = {}
        if isinstance(self._credentials, AnonymousCredentials):
            return headers
        try:
            with self._lock:
                if renew:
                    self._credentials.refresh(self._renewal)
                self._credentials.before_request(self._renewal, "GET", self._endpoint, headers)
        except exceptions.TransportError as error:
            raise Fault(f"no access token could be fetched ({type(error).__name__})") from None
        except exceptions.GoogleAuthError as error:
            raise Refused(
                f"The Google credentials found here are invalid ({error.args[0]}); run "
                "`gcloud auth application-default login`"
            ) from None
        return headers


def _object(body: bytes) -> dict[str, Any]:
    """Parses a JSON object; Fault if it is not one, such as a truncated answer."""
    problems: list[str] = []
    try:
        return load_object(body, "The answer", problems)
    except UserError as error:
        raise Fault(str(error)) from None


def _objects(page: Mapping[str, Any], prefix: str) -> dict[str, Object]:
    """A page of a listing, by what follows the prefix in names."""
    try:
        return {
            name: Object(_size(item["size"]), str(item["generation"]))
            for item in page.get("items", ())
            if (name := item["name"].removeprefix(prefix))  # empty: a placeholder for a directory
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Refused(f"The listing of the bucket is malformed ({error!r})") from None


def _size(said: str) -> int:
    if not said.isdecimal():
        raise ValueError(f"{said!r} bytes")
    return int(said)


def _credentials() -> Any:
    """Application Default Credentials; anonymous ones if there are none, for public buckets."""
    if os.environ.get(_EMULATOR):
        return AnonymousCredentials()
    try:
        return google.auth.default(scopes=[_SCOPE])[0]
    except exceptions.DefaultCredentialsError:
        return AnonymousCredentials()
