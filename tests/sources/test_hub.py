"""Models on a Hub, read by range: a real server, another process, that can also fail."""

from itertools import cycle

import pytest
import tiny
from hubs import TOKEN, hub_in
from jobs import job_words

from maxconv.sources.hub import find_token
from maxconv.sources.remote import GAP, SPAN, spans

CASE, MODEL = "qwen3-30b-a3b", "org/qwen"


@pytest.fixture
def hub(tmp_path):
    with hub_in(tmp_path) as hub:
        tiny.write(CASE, hub.root / MODEL)
        yield hub


def convert(hub, directory, path, *more, **environ):
    words = job_words(directory, path, tiny.maxtext_words(CASE, True), "fsdp8", more)
    return hub.convert(*words, "--verify=none", **environ)


def leaves(directory):
    """The bytes of a checkpoint's data files, whatever their names."""
    files = (directory / "out/0/items").glob("**/c/**/*")
    return sorted(path.read_bytes() for path in files if path.is_file())


PLAIN = ("checkpoint_storage_use_ocdbt=false",)


def test_a_model_of_the_hub_converts_like_its_files(hub, tmp_path):
    kinds = ("429:1", "503", "whole", "cut", "reset", "other", "403")
    shards = sorted((hub.root / MODEL).glob("*.safetensors"))
    faults = [[f"/store/*/{s.name}", k, 1] for s, k in zip(cycle(shards), kinds, strict=False)]
    hub.settings(faults=faults, gated=[MODEL])
    here, there = tmp_path / "here", tmp_path / "there"
    done = convert(hub, there, f"hf://{MODEL}", *PLAIN, "--max_retries=9", HF_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert convert(hub, here, hub.root / MODEL, *PLAIN).returncode == 0
    assert leaves(there) == leaves(here) != []

    asked = [entry for entry in hub.log if "/resolve/" in entry["path"]]
    assert len(asked) <= len(shards) + len(faults) + 4
    assert len(shards) == 5
    data = sum(p.stat().st_size for p in shards)
    good = [e for e in hub.log if e["path"].startswith("/store/") and e["status"] == 206]
    assert data <= sum(entry["bytes"] for entry in good) <= 3 * data  # headers, and what was cut
    hub.assert_secret(done.stdout, done.stderr)


READS = """
import sys
from maxconv.sources import open_source
with open_source(sys.argv[1]) as source:
    for _ in range(3):
        for name in source.tensors:
            source.tensor(name)
"""


def test_an_address_is_asked_for_once_and_again_when_it_is_out_of_date(hub):
    tiny.write(CASE, hub.root / MODEL, shard_bytes=None)
    for path in (hub.root / MODEL).glob("model-*"):
        path.unlink()
    (hub.root / MODEL / "model.safetensors.index.json").unlink()
    file = "model.safetensors"
    for denied in (0, 1):
        hub.settings(faults=[[f"/store/{MODEL}/{file}", "403", denied]])
        before = len(hub.log) if denied else 0
        done = hub.run("-c", READS, f"hf://{MODEL}")
        assert done.returncode == 0, done.stderr
        asked = [e for e in hub.log[before:] if e["path"].endswith(f"/{file}")]
        assert sum("/resolve/" in e["path"] for e in asked) == 1 + denied
        assert sum("/store/" in e["path"] for e in asked) > 10


@pytest.mark.parametrize(
    ("settings", "path", "environ", "code", "said"),
    [
        ({"gated": [MODEL]}, MODEL, {}, 2, "is gated: ask for access at"),
        ({"gated": [MODEL]}, f"hf://{MODEL}@v9", {}, 2, "is gated: ask for access at"),
        ({"gated": [MODEL]}, MODEL, {"HF_TOKEN": TOKEN}, 2, "this token has no access"),
        ({}, "org/other", {"HF_TOKEN": TOKEN}, 2, "not on the Hub, or private and not for this"),
        ({"private": [MODEL]}, MODEL, {}, 2, "not on the Hub, or private: check it, or set HF"),
        ({}, MODEL, {"HF_TOKEN": "hf_bad"}, 2, "The Hub does not accept the token"),
        ({"faults": [["/api/*", "403", 9]]}, MODEL, {}, 2, f"The token may not read {MODEL}"),
        ({}, f"hf://{MODEL}@v9", {}, 2, "has no revision v9"),
        ({}, f"hf://datasets/{MODEL}", {}, 2, "is not of the form hf://org/name"),
        ({}, MODEL, {"HF_HUB_OFFLINE": "1"}, 2, "is not in the Hugging Face cache"),
        ({"faults": [["/store/*", "503", 99]]}, MODEL, {}, 42, "the server answered 503, 2 times"),
    ],
)
def test_what_keeps_us_from_a_model_is_said(hub, tmp_path, settings, path, environ, code, said):
    hub.settings(**({"allowed": []} | settings))
    done = convert(hub, tmp_path, path, "--max_retries=1", **environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-2 if code == 42 else -1] and TOKEN not in done.stderr
    assert not (tmp_path / "out").exists()


REPLACED = """
import sys
from maxconv.sources import open_source

source = open_source(sys.argv[1])
info = next(iter(source.stored.values()))
with open(f"{sys.argv[2]}/{info.file}", "r+b") as file:
    file.seek(info.offset)
    file.write(b"other")
source.tensor(info.name)
"""


def test_a_file_that_changes_at_a_commit_ends_the_reading(hub, tmp_path):
    """The Hub is asked again when an address is out of date, and then says so."""
    shards = len(list((hub.root / MODEL).glob("*.safetensors")))
    hub.settings(faults=[["/store/*.safetensors", "403", 1, shards]])
    done = hub.run("-c", REPLACED, MODEL, str(hub.root / MODEL))
    assert f"in hf://{MODEL} was replaced or removed while it was read" in done.stderr


def test_the_cache_of_hugging_face_serves_offline(hub, tmp_path):
    assert convert(hub, tmp_path, MODEL, "--cache").returncode == 0
    asked = len(hub.log)
    done = convert(hub, tmp_path, MODEL, "--overwrite", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert len(hub.log) == asked


def test_tokens_come_in_this_order(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_TOKEN", "HF_AUTH_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    assert find_token(None) is None
    (tmp_path / "token").write_text("of the login")
    assert find_token(None) == "of the login"
    monkeypatch.setenv("HF_AUTH_TOKEN", "of MaxText")
    assert find_token(None) == "of MaxText"
    monkeypatch.setenv("HF_TOKEN", "of the Hub")
    assert find_token(None) == "of the Hub"
    assert find_token("given") == "given"


def test_runs_are_asked_for_together_when_they_are_near():
    assert [*spans([0, 10, 30], 5)] == [(0, 35, [(0, 0), (10, 5), (30, 10)])]
    far = GAP + 6
    assert [*spans([0, far], 5)] == [(0, 5, [(0, 0)]), (far, far + 5, [(far, 5)])]
    long = SPAN + 7
    assert [*spans([3], long)] == [
        (3, SPAN + 3, [(3, 0)]),
        (SPAN + 3, long + 3, [(SPAN + 3, SPAN)]),
    ]
