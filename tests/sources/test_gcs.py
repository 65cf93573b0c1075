"""Checkpoints in a bucket, read by range: a real server, another process, that can also fail."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import urllib3
from buckets import Bucket, serving
from google.oauth2.credentials import Credentials

from maxconv.errors import RetryableError, UserError
from maxconv.sources import LocalSource, Source, http, open_source
from maxconv.sources import bucket as gcs
from maxconv.sources.concurrency import FIRST as FIRST_AT_ONCE

CASE = "qwen3-8b"
FIRST = "model-00001-of-00005.safetensors"
DATA = "*/o/hf/model-0000*.safetensors"


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with serving(tmp_path / "gcs") as bucket:
        for name, value in bucket.environ.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(http, "READ", 0.5)
        bucket.put(tiny.write(CASE, tmp_path / "hf"), "hf")
        yield bucket


def same(source: Source, directory: Path) -> bool:
    """Whether a source holds what a directory does, to the bit."""
    with LocalSource(directory) as here, source as there:
        names = [*here.tensors]
        assert names == [*there.tensors]
        return all(
            np.array_equal(there.tensor(n).view(np.uint8), here.tensor(n).view(np.uint8))
            for n in names
        )


def test_it_is_read_as_it_is(bucket: Bucket, tmp_path: Path) -> None:
    (tmp_path / "hf" / "of people ü.txt").write_text("a name that must be quoted")
    bucket.put(tmp_path / "hf", "a b/ü")
    for place in ("gs://bucket/hf", "gs://bucket/hf/", "gs://bucket/a b/ü"):
        assert same(open_source(place), tmp_path / "hf")
    source = open_source("gs://bucket/hf", revision="main")
    assert list(source.notices) == ["gs://bucket/hf is a directory: revision main is ignored"]
    assert len(source.versions()) == len(list((tmp_path / "hf").glob("*.safetensors")))


def test_bytes_that_were_served_are_accounted_for(bucket: Bucket, tmp_path: Path) -> None:
    source = open_source("gs://bucket/hf")
    assert same(source, tmp_path / "hf")
    total = source.stats.bytes_read + source.traffic.headers
    assert sum(entry["bytes"] for entry in bucket.served) == source.traffic.nbytes == total
    assert len(bucket.served) == source.traffic.requests


def test_parts_that_are_near_are_asked_for_together(bucket: Bucket, tmp_path: Path) -> None:
    """Columns of a tensor: what lies between them comes along, as was foretold."""
    source = open_source("gs://bucket/hf")
    info = source.tensors["lm_head.weight"]
    rows, columns = info.shape
    box = (0, rows), (8, 8 + columns // 3)
    before, array = source.traffic, np.empty((rows, columns // 3), info.dtype)
    source.read(info, [(box, array)])
    with LocalSource(tmp_path / "hf") as here:
        whole = here.tensor(info.name)
    assert np.array_equal(array.view(np.uint16), whole[:, 8 : 8 + columns // 3].view(np.uint16))
    requests, came, between, _ = (n - m for n, m in zip(source.traffic, before, strict=True))
    row = columns * info.dtype.itemsize
    assert requests == 1 and between == (rows - 1) * (row - row // 3)
    assert came == array.nbytes + between and source.between(info, [box]) == between


@pytest.mark.parametrize(
    "kind",
    [
        *("429:1", "503", "reset", "cut", "whole", "other"),
        *("mute:2", "forever", "continue", "trickle"),
        pytest.param("500", marks=pytest.mark.slow),
    ],
)
def test_what_may_pass_is_tried_again(bucket: Bucket, tmp_path: Path, kind: str) -> None:
    """A fault at the first request for a header, and at two for data."""
    well = open_source("gs://bucket/hf")
    assert same(well, tmp_path / "hf")
    files = len(list((tmp_path / "hf").glob("*.safetensors")))
    bucket.settings(faults=[[f"*/o/hf/{FIRST}", kind, 1], [DATA, kind, 2, files]])
    source, began = open_source("gs://bucket/hf"), time.monotonic()
    assert same(source, tmp_path / "hf")
    assert source.traffic.requests == well.traffic.requests + 3
    assert source.stats == well.stats
    assert time.monotonic() - began > (1 if kind == "429:1" else 0.2)


def test_one_failure_ends_all_reads(bucket: Bucket) -> None:
    """Reads that wait for their turn do not start to find out by themselves."""
    source = open_source("gs://bucket/hf", max_retries=1)
    before = source.traffic.requests
    bucket.settings(faults=[[DATA, "mute:99", 9999]])
    with ThreadPoolExecutor(16) as pool:
        reads = [pool.submit(source.tensor, name) for name in source.tensors]
        errors = [read.exception() for read in reads]
    assert {type(error) for error in errors} == {RetryableError}
    assert source.traffic.requests - before <= 2 * FIRST_AT_ONCE < len(errors)
    source.close()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("7", 7), ("99999", 60), ("9" * 5000, 60), ("-1", 0), ("1.5", 0), ("²", 0)]
    + [("", 0), ("soon", 0), ("Fri, 31 Dec 1999 23:59:59 GMT", 0)]
    + [("Fri, 31 Dec 2199 23:59:59 GMT", 60), ("Fri, 31 Dec 2199 23:59:59", 60)],
)
def test_a_server_may_ask_to_wait_a_minute_at_most(text: str, seconds: float) -> None:
    assert http.retry_after(text) == seconds


@pytest.mark.parametrize(
    ("url", "there", "target"),
    [
        ("https://h/a", "/b", "https://h/b"),
        ("http://h/a", "https://h/b", "https://h/b"),
        ("https://h/a", "http://h/b", None),
        ("https://h/a", "HTTP://h/b", None),
        ("https://h/a", "//other/b", "https://other/b"),
        ("https://h/a", "file:///etc/passwd", None),
        ("https://h/a", "ftp://h/b", None),
        ("https://h/a", "https://h:port/b", None),
        ("https://h/a", "https://[h/b", None),
    ],
)
def test_redirects_lead_to_addresses_that_are_as_safe(
    url: str, there: str, target: str | None
) -> None:
    answer = urllib3.HTTPResponse(status=302, headers={"Location": there})
    if target is None:
        with pytest.raises(OSError, match="redirects"):
            http.redirected(url, answer)
    else:
        assert http.redirected(url, answer) == target


def test_an_origin_is_a_scheme_a_host_and_a_port() -> None:
    same = http.same_origin
    assert same("https://h/a", "https://H:443/b") and same("http://h:80", "http://h")
    for other in ("http://h/a", "https://h:8443/a", "https://g/a", "http://h:443/a"):
        assert not same("https://h/a", other)


@pytest.mark.parametrize("size", ["-5", "1e9", "99999999999999", None])
def test_sizes_that_a_listing_states_are_checked(bucket: Bucket, size: str | None) -> None:
    """Nothing is allocated for what a server merely says."""
    listing = {"items": [{"name": "hf/config.json", "size": size, "generation": "1"}]}
    bucket.settings(listing=listing)
    with pytest.raises(UserError, match="malformed|more than the limit of 100,000,000"):
        open_source("gs://bucket/hf")


def test_what_does_not_pass_is_worth_another_try(bucket: Bucket) -> None:
    bucket.settings(faults=[[f"*/o/hf/{FIRST}", "503", 99]])
    said = f"{FIRST} in gs://bucket/hf could not be read: the server answered 503, 2 times; try"
    with pytest.raises(RetryableError, match=said):
        open_source("gs://bucket/hf", max_retries=1)


@pytest.mark.parametrize("kind", ["replace", "remove"])
def test_an_object_that_changes_ends_the_reading(bucket: Bucket, kind: str) -> None:
    source = open_source("gs://bucket/hf")
    bucket.settings(faults=[[f"*/o/hf/{FIRST}", kind, 1]])
    before = len(bucket.log)
    name = next(name for name, info in source.stored.items() if info.file == FIRST)
    with pytest.raises(OSError, match=f"{FIRST} in gs://bucket/hf was replaced or removed while"):
        source.tensor(name)
    assert len(bucket.log) == before + 1  # that does not pass: it is not tried again


@pytest.mark.parametrize(
    ("place", "fault", "said"),
    [
        ("gs://nobucket/hf", None, "There is no bucket gs://nobucket; check its name"),
        ("gs://bucket/none", None, "gs://bucket/none holds no objects; give the directory of a"),
        ("gs://bucket/hf/config.json", None, "gs://bucket/hf/config.json holds no objects"),
        ("gs:///hf", None, "gs:///hf names no bucket; expected gs://BUCKET/DIRECTORY"),
        ("gs://bucket/hf", ["*/o", "403", 9], "storage.objects.get on gs://bucket; grant it"),
        (
            "gs://bucket/hf",
            ["*/o", "401", 9],
            "is not public, and no Google credentials were found",
        ),
        ("gs://bucket/hf", [DATA, "403", 99], "The account here lacks stor"),
    ],
)
def test_what_keeps_us_from_a_checkpoint_is_said(
    bucket: Bucket, place: str, fault: list[Any] | None, said: str
) -> None:
    bucket.settings(faults=[fault] if fault else [])
    with pytest.raises(UserError) as error:
        open_source(place)
    assert said in error.value.problems[0]


def test_a_token_that_is_out_of_date_is_renewed(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{bucket.url}/token"
    ours: Any = Credentials(None, "refresh", token_uri=uri, client_id="me", client_secret="secret")
    monkeypatch.setattr(gcs, "_credentials", lambda: ours)
    bucket.settings(token="first")
    source = open_source("gs://bucket/hf")
    bucket.settings(token="second")
    assert same(source, tmp_path / "hf")
    bucket.settings(token="third", grants=False)
    with pytest.raises(
        UserError, match="The Google credentials found here are invalid .*; run `gcl"
    ):
        open_source("gs://bucket/hf")


def test_what_was_not_downloaded_well_is_said(bucket: Bucket, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
    (tmp_path / "hf" / FIRST).write_bytes(pointer)
    unfinished = tmp_path / "hf" / "model.safetensors.incomplete"
    unfinished.write_bytes(b"")
    bucket.put(tmp_path / "hf", "hf")
    with pytest.raises(UserError) as error:
        open_source("gs://bucket/hf")
    problems = "\n".join(error.value.problems)
    assert f"{FIRST} is a Git LFS pointer, not the file itself" in problems
    assert f"holds unfinished downloads ('{unfinished.name}')" in problems


def test_a_long_listing_comes_in_pages(bucket: Bucket, tmp_path: Path) -> None:
    bucket.settings(page=2)
    assert same(open_source("gs://bucket/hf"), tmp_path / "hf")
    assert sum(entry["path"].endswith("/o") for entry in bucket.log) > 3
