"""The scripts in launch/, with commands on PATH that only record how they were called."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "launch/README.md").read_text()
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
CONVERT = ("--", "model_name=qwen3-0.6b", "base_output_directory=gs://b/a b")
VM = ("--name=n", "--zone=z")

# A slice is there once it was made, or if THERE; of xpk's manifest there is one line.
FAKE = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if "describe" in sys.argv:
    print("READY")
    sys.exit(0 if os.environ.get("THERE") or '"create"' in open(os.environ["CALLS"]).read() else 1)
if "--output-manifest-file" in sys.argv:
    with open(sys.argv[sys.argv.index("--output-manifest-file") + 1], "w") as file:
        print("  env: ", file=file)
"""


def run(tmp_path: Path, script: str, *words: str, **environ: str):
    """What a script says, and how it called gcloud, xpk and kubectl."""
    for name in ("gcloud", "xpk", "kubectl"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    path = f"{tmp_path}:{os.environ['PATH']}"
    environ = {**os.environ, "HF_TOKEN": "hf_secret", "PATH": path, "CALLS": str(calls), **environ}
    done = subprocess.run(
        [ROOT / "launch" / script, *words],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "hf_secret" not in done.stdout + done.stderr + calls.read_text()
    return done, [json.loads(line) for line in calls.read_text().splitlines()]


def test_shellcheck() -> None:
    scripts = [*SCRIPTS, *ROOT.glob("tests/*/*.sh"), *ROOT.glob(".ci/*")]
    shellcheck = Path(sys.executable).parent / "shellcheck"  # of the test extra
    checked = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("there", ["", "1"])
def test_a_slice_is_made_only_if_it_is_not_there(tmp_path: Path, there: str) -> None:
    made = ("--type=v5p-64", "--version=v2-alpha-tpuv5", "--spot", "--project=p")
    done, calls = run(tmp_path, "gcloud.sh", *VM, *made, *CONVERT, THERE=there)
    assert done.returncode == 0, done.stderr
    assert [call[2:4] for call in calls] == [
        ["tpu-vm", "describe"],
        *([] if there else [["tpu-vm", "create"]]),
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
    ]
    assert all("--zone=z" in call and "--project=p" in call for call in calls)
    assert "--worker=all" in calls[-1] and "--output-directory=maxconv-logs" in calls[-1]
    command = next(word for word in calls[-1] if word.startswith("--command="))
    assert shlex.split(command.removeprefix("--command=")) == [
        "HF_TOKEN_PATH=.maxconv/token",
        ".maxconv/bin/maxconv",
        "convert",
        *CONVERT[1:],
    ]
    assert (tmp_path / "maxconv-logs").is_dir()


def test_a_queued_resource_is_waited_for(tmp_path: Path) -> None:
    made = ("--type=v5p-64", "--version=v2-alpha-tpuv5", "--queued")
    done, calls = run(tmp_path, "gcloud.sh", *VM, *made, *CONVERT, HF_TOKEN="")
    assert done.returncode == 0, done.stderr
    assert [call[2:4] for call in calls] == [
        ["tpu-vm", "describe"],
        ["queued-resources", "create"],
        ["tpu-vm", "describe"],
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],
        ["tpu-vm", "ssh"],
    ]
    assert "--node-id=n" in calls[1]


def test_the_manifest_is_applied_with_the_secret(tmp_path: Path) -> None:
    cluster = ("--project=p", "--project-number=1", "--zone=z", "--cluster=c", "--image=i")
    manifest = tmp_path / "manifest"
    options = (*cluster, "--tpu-type=v5p-8", "--secret=hf", f"--manifest={manifest}")
    done, calls = run(tmp_path, "xpk.sh", *options, *CONVERT)
    assert done.returncode == 0, done.stderr
    assert calls[-1] == ["apply", "-f", str(manifest)]
    assert "  - name: HF_TOKEN\n    valueFrom:\n" in manifest.read_text()


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("xpk.sh", ["--project=p", *CONVERT], "missing --project-number="),
        ("xpk.sh", ["--projekt=p"], "no option --projekt=p"),
        ("gcloud.sh", ["--zone=z", *CONVERT], "give --name="),
        ("gcloud.sh", [*VM, "--type=v5p-8", *CONVERT], "give --version="),
        ("gcloud.sh", [*VM], "give what to convert"),
        ("gcloud.sh", [*VM, *CONVERT, "hf_access_token=x"], "no token on a command line"),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, script: str, words: list[str], said: str) -> None:
    done, calls = run(tmp_path, script, *words)
    assert (done.returncode, calls) == (2, [])
    assert said in done.stderr


def page_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [line for line in lines if line.startswith("launch/")]


@pytest.mark.parametrize("command", page_commands())
def test_the_commands_of_the_page(tmp_path: Path, command: str) -> None:
    script, *words = shlex.split(command)
    words.insert(words.index("--"), "--dry-run")
    done, calls = run(tmp_path, Path(script).name, *words)
    assert done.returncode == 0, done.stderr
    assert not [call for call in calls if "--dry-run" not in call]  # xpk's own, and no other
    if script.endswith("gcloud.sh") and shutil.which("gcloud"):
        printed = [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]
        assert printed
        for line in printed:
            lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
            said = subprocess.run(lint, capture_output=True, text=True, check=True).stdout
            assert json.loads(said)[0]["success"], said


def test_the_page_has_commands_of_every_script() -> None:
    assert {f"launch/{path.name}" for path in SCRIPTS} == {c.split()[0] for c in page_commands()}
