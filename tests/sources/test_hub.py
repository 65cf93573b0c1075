"""Models on a Hub, read by range: a real server, another process, that can also fail."""

import subprocess
from itertools import cycle

import pytest
import tiny
from hubs import TOKEN, hub_in
from jobs import job_words

from maxconv import cli
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
    ("settings", "path", "token", "said"),
    [
        ({"gated": [MODEL]}, MODEL, "", "is gated; request access at"),
        ({"gated": [MODEL]}, f"hf://{MODEL}@v9", "", "is gated; request access at"),
        ({"gated": [MODEL]}, MODEL, TOKEN, "this token has no access"),
        ({}, "org/other", TOKEN, "not on the Hub, or is private and this token has no access"),
        (
            {"private": [MODEL]},
            MODEL,
            "",
            "not on the Hub, or is private; check the name, or set HF",
        ),
        ({}, MODEL, "hf_bad", "The Hub does not accept the token"),
        ({"faults": [["/api/*", "403", 9]]}, MODEL, "", f"The token has no read access to {MODEL}"),
        ({}, f"hf://{MODEL}@v9", "", "has no revision v9"),
        ({}, f"hf://datasets/{MODEL}", "", "is not of the form hf://org/name"),
    ],
)
def test_what_keeps_us_from_a_model_is_said(
    hub, tmp_path, monkeypatch, capsys, settings, path, token, said
):
    hub.settings(**({"allowed": []} | settings))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in ("HF_AUTH_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", token)
    words = job_words(tmp_path, path, tiny.maxtext_words(CASE, True), "fsdp8")
    assert cli.main(["convert", *words, "--verify=none", "--max_retries=1"]) == 2
    out, err = capsys.readouterr()
    assert said in err.splitlines()[-1] and not out and TOKEN not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "environ", "code", "said"),
    [
        ({}, {"HF_HUB_OFFLINE": "1"}, 2, "is not in the Hugging Face cache"),
        ({"faults": [["/store/*", "503", 99]]}, {}, 42, "the server answered 503, 2 times"),
    ],
)
def test_as_a_person_sees_it(hub, tmp_path, settings, environ, code, said):
    hub.settings(**({"allowed": []} | settings))
    done = convert(hub, tmp_path, MODEL, "--max_retries=1", **environ)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


IMPATIENT = """
import sys
from maxconv.errors import ConversionError
from maxconv.sources import http, open_source
http.READ = http.CALL = http.MOST_ASKED = 1
try:
    with open_source(sys.argv[1]) as source:
        for name in source.tensors:
            source.tensor(name)
    print(len(source.tensors), source.revision)
except (ConversionError, OSError) as error:
    print(type(error).__name__, error)
"""
ONE = "*/model-00001-of-*"  # of the files


@pytest.mark.slow
def test_the_api_is_asked_again_like_files(hub):
    """Whatever asks the Hub waits as long as it is told, but not for ever, and tries again."""
    well = hub.run("-c", IMPATIENT, MODEL)
    hub.settings(
        faults=[
            ["/api/*/auth-check", "429:99999", 1],
            ["/api/*/auth-check", "500", 1],
            ["/api/models/org/qwen", "503:Wed, 01 Jan 2200 00:00:00 GMT", 1],
            ["/api/models/org/qwen", "mute:2", 1],
            [f"/{MODEL}/resolve/{ONE}", "continue", 1],
            [f"/{MODEL}/resolve/{ONE}", "forever", 1],
        ]
    )
    done = hub.run("-c", IMPATIENT, MODEL)
    assert well.returncode == done.returncode == 0 and done.stdout == well.stdout != ""
    hub.settings(faults=[["/api/*/auth-check", "503", 99]])
    done = hub.run("-c", IMPATIENT.replace("(sys.argv[1])", "(sys.argv[1], max_retries=1)"), MODEL)
    said = f"A request to the Hub about {MODEL} failed: the server answered 503, 2 times; try again"
    assert done.stdout.startswith(f"RetryableError {said}")


def test_an_answer_that_makes_no_sense_is_bad_input(hub):
    hub.settings(faults=[["/api/models/org/qwen", "200", 9]])  # an object without entries
    done = hub.run("-c", IMPATIENT, MODEL)
    said = f"UserError The answer about {MODEL} is malformed"
    assert done.stdout.startswith(said) and f"check that HF_ENDPOINT, {hub.url}, is" in done.stdout


def test_a_model_that_was_renamed_is_read(hub):
    well = hub.run("-c", IMPATIENT, MODEL)
    hub.settings(renamed={"org/first": "org/second", "org/second": MODEL}, gated=[MODEL])
    done = hub.run("-c", IMPATIENT, "org/first", HF_TOKEN=TOKEN)
    assert well.returncode == done.returncode == 0 and done.stdout == well.stdout != ""
    hub.assert_secret(done.stdout, done.stderr)


def test_redirects_are_followed_to_an_end(hub):
    """From where the Hub sends us, too; but not in circles."""
    files = len([*(hub.root / MODEL).glob("*.safetensors")])
    other = f"{hub.url.replace('127.0.0.1', 'localhost')}/store/{MODEL}/model-00001-of-0000{files}"
    hub.settings(faults=[["/store/*/model-00002-*", f"to:302:{other}.safetensors", 1]])
    done = hub.run("-c", IMPATIENT, MODEL)
    assert "00002-of" in done.stdout and "the server sent a different range" not in done.stdout
    circle = "/store/org/qwen/model-00002-of-00005.safetensors"
    hub.settings(faults=[[circle, f"to:307:{circle}", 999]])
    done = hub.run("-c", IMPATIENT, MODEL)
    assert "UserError" in done.stdout and "redirects more than 10 times" in done.stdout


def test_the_token_goes_to_the_scheme_host_and_port_of_the_hub_alone(hub, tmp_path):
    """Another port is another server, and over http everybody reads."""
    key, pem = tmp_path / "key.pem", tmp_path / "cert.pem"
    subject = ("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")
    make = ("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    subprocess.run([*make, "-nodes", "-keyout", key, "-out", pem, *subject], check=True)
    both = tmp_path / "both.pem"
    both.write_bytes(key.read_bytes() + pem.read_bytes())
    (tmp_path / "tls").mkdir()
    with hub_in(tmp_path / "tls", both) as secure:
        tiny.write(CASE, secure.root / MODEL)
        for there in (secure.url.replace("https:", "http:"), hub.url):
            file = f"{there}/{MODEL}/resolve/main/model.safetensors"
            secure.settings(faults=[[f"/{MODEL}/resolve/{ONE}", f"to:302:{file}", 99]])
            done = secure.run("-c", IMPATIENT, MODEL, HF_TOKEN=TOKEN, SSL_CERT_FILE=str(pem))
            assert done.stdout.startswith("UserError https://127.0.0.1/"), done.stderr
            assert "redirects from https to http, which is not followed" in done.stdout
        assert hub.log == []
        file = f"{secure.url}/{MODEL}/resolve/main/model-00001-of-00005.safetensors"
        hub.settings(faults=[[f"/{MODEL}/resolve/{ONE}", f"to:302:{file}", 99]])
        before = len(secure.log)
        done = hub.run("-c", IMPATIENT, MODEL, HF_TOKEN=TOKEN, SSL_CERT_FILE=str(pem))
        asked = secure.log[before:]
        assert asked and {entry["authorization"] for entry in asked} == {None}


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
    assert f"in hf://{MODEL} was replaced or removed while it was being read" in done.stderr


def test_the_cache_of_hugging_face_serves_offline(hub, tmp_path):
    others = ("consolidated.safetensors", "original/model.safetensors", "tokenizer.json")
    for other in others:
        (hub.root / MODEL / other).parent.mkdir(exist_ok=True)
        (hub.root / MODEL / other).write_bytes(b"none of the model's")
    assert convert(hub, tmp_path, MODEL, "--cache").returncode == 0
    asked = len(hub.log)
    assert not [e for e in hub.log if e["path"].endswith(others)]
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
