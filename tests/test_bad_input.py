"""Whatever is wrong with the words or the files: a sentence, exit code 2, and nothing written."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import CPU, MESHES, job_words
from safetensors.numpy import load_file, save_file

from maxconv import cli
from maxconv.families import BY_ARCHITECTURE
from maxconv.targets.place import problems

CASE = "llama3.1-8b"
BARE = (*CPU, *MESHES["fsdp8"])
NORM = "model.norm.weight"


class Place:
    """A tiny checkpoint, and a command line that converts it."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]):
        self.directory, self.capsys = directory, capsys
        self.hf, self.out = tiny.write(CASE, directory / "hf"), directory / "out"
        self.words: list[str] = job_words(
            directory, self.hf, tiny.maxtext_words(CASE, True), "fsdp8"
        )

    def bare(self) -> None:
        """Takes the model from config.json alone."""
        self.words = [f"--hf_model_path={self.hf}", f"base_output_directory={self.out}", *BARE]

    def config(self, **entries: Any) -> None:
        path = self.hf / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    def tensors(self, change: Callable[[dict[str, Any]], object]) -> None:
        """Rewrites the checkpoint with other tensors, as one file."""
        (self.hf / "model.safetensors.index.json").unlink()
        tensors = {}
        for file in sorted(self.hf.glob("*.safetensors")):
            tensors |= load_file(file)
            file.unlink()
        change(tensors)
        save_file(tensors, self.hf / "model.safetensors")

    def refused(self, *words: str, command: str = "convert") -> list[str]:
        """The sentences with which a conversion is refused, that leaves everything as it is."""
        before = snapshot(self.directory)
        self.capsys.readouterr()
        code = cli.main([command, *self.words, *words])
        out, err = self.capsys.readouterr()
        assert code == 2 and not out, out
        lines = [line for line in err.splitlines() if not line.startswith("note: ")]
        assert lines and all(line.startswith("maxconv: ") for line in lines), err
        assert "Traceback" not in err
        assert snapshot(self.directory) == before
        return [line.removeprefix("maxconv: ") for line in lines]

    def converts(self, *words: str) -> None:
        assert cli.main(["convert", *self.words, "--verify=none", *words]) == 0


@pytest.fixture
def place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, capsys)


def snapshot(directory: Path) -> dict[str, tuple[int, int]]:
    """Every file's size and time of change."""
    return {
        str(path): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
    }


def test_as_a_person_would(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    for module, first in (("maxconv.to_maxtext", []), ("maxconv.cli", ["convert"])):
        words = [*first, f"--hf_model_path={tmp_path}/none", f"base_output_directory={out}"]
        command = [sys.executable, "-m", module, *words, *BARE]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2
        assert (
            done.stderr
            == f"maxconv: {tmp_path}/none does not exist; check the path, or download it first.\n"
        )
        assert not done.stdout and not out.parent.exists()


# The source.


def test_a_wrong_directory(place: Place) -> None:
    for path, why in {
        f"{place.directory}/nothing": "does not exist; check the path, or download it first.",
        f"{place.hf}/config.json": "is a file; give the directory that holds it.",
        f"{place.directory}": "config.json in",
    }.items():
        assert why in place.refused(f"--hf_model_path={path}")[0]


@pytest.mark.parametrize("word", ["use_multimodal=True", "use_audio=True", "mtp_num_layers=1"])
def test_parts_that_a_model_does_not_have(place: Place, word: str) -> None:
    (problem,) = place.refused(word)
    assert problem == f"{word}, but MaxText's LlamaForCausalLM has no such part; remove it."


def test_what_is_no_name_on_the_hub(place: Place) -> None:
    (problem,) = place.refused("--hf_model_path=hf://Llama-3.1-8B")
    assert problem == (
        "hf://Llama-3.1-8B is not of the form hf://org/name or hf://org/name@revision."
    )


def test_no_source(place: Place) -> None:
    place.words = [*BARE]
    (problem,) = place.refused()
    assert "--hf_model_path=" in problem


def test_no_config(place: Place) -> None:
    (place.hf / "config.json").unlink()
    (problem,) = place.refused()
    assert (
        problem
        == f"config.json in {place.hf} does not exist; check the path, or download it first."
    )


@pytest.mark.parametrize("architectures", [["GPT2LMHeadModel"], "GPT2LMHeadModel"])
def test_an_architecture_that_is_not_known(place: Place, architectures: Any) -> None:
    place.config(architectures=architectures)
    (problem,) = place.refused()
    assert problem == (
        f"{place.hf} is a GPT2LMHeadModel, which is not supported; supported architectures are "
        f"{', '.join(BY_ARCHITECTURE)}. To add one, see `maxconv help models`."
    )


@pytest.mark.parametrize("architectures", [None, [], ""])
def test_no_architecture(place: Place, architectures: Any) -> None:
    place.config(architectures=architectures, model_type=None)
    place.bare()
    (problem,) = place.refused()
    assert "is a model without an architecture in config.json, which is not supported" in problem
    assert "supported architectures are Llama" in problem


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"hidden_size": None}, ["there is no entry 'hidden_size'"]),
        (
            {"hidden_size": "42", "num_attention_heads": 0, "tie_word_embeddings": 1},
            [
                'hidden_size="42" is not a whole number from 1 to 2147483647',
                "num_attention_heads=0 is not a whole number from 1 to 2147483647",
                "tie_word_embeddings=1 is not true or false",
            ],
        ),
        (
            {"vocab_size": 300, "hidden_size": 43},
            [
                "vocab_size=300 and hidden_size=43, but model.embed_tokens.weight is (259, 42)",
            ],
        ),
    ],
)
def test_a_config_that_makes_no_sense(
    place: Place, entries: dict[str, Any], expected: list[str]
) -> None:
    place.config(**entries)
    place.bare()
    mend = "use that of the original model."
    assert place.refused() == [f"config.json in {place.hf}: {text}; {mend}" for text in expected]


def test_more_layers_than_config_says(place: Place) -> None:
    place.config(num_hidden_layers=2)
    place.bare()
    found = place.refused()
    assert len(found) == 9
    assert all(
        "tensor model.layers.2." in problem and "has no counterpart" in problem for problem in found
    )
    place.config(num_hidden_layers=1)
    assert all("and 1 of its kind have no counterpart" in problem for problem in place.refused())


def test_another_model(place: Place) -> None:
    place.bare()
    found = place.refused("model_name=llama3.1-8b")
    entries = "hidden_size=42 intermediate_size=52 num_attention_heads=6 num_key_value_heads=2 "
    entries += "head_dim=10 num_hidden_layers=3 vocab_size=259"
    (problem,) = found  # with one line of arguments, to be copied
    assert all(
        f" of llama3.1-8b contradicts {entry} in config.json" in problem
        for entry in entries.split()
    )
    _, mend = problem.split("leave out model_name, or add ")
    place.converts("model_name=llama3.1-8b", *mend.rstrip(".").split())
    first, *_, last = place.refused("model_name=qwen3-0.6b")
    assert first.startswith("model_name=qwen3-0.6b is a Qwen3ForCausalLM, but config.json says")
    assert "logits_via_embedding=True of qwen3-0.6b contradicts tie_word_embeddings" in last


def test_a_size_that_is_not_that_of_the_checkpoint(place: Place) -> None:
    (problem,) = place.refused("base_emb_dim=48")
    assert problem.startswith("base_emb_dim=48 contradicts hidden_size=42 in config.json")


def test_a_missing_tensor(place: Place) -> None:
    place.tensors(lambda tensors: tensors.pop(NORM))
    (problem,) = place.refused()
    assert problem.endswith(f"tensor {NORM} is missing.")


def test_an_extra_tensor(place: Place) -> None:
    place.tensors(lambda tensors: tensors.update({"model.norm.bias": tensors[NORM]}))
    (problem,) = place.refused()
    assert problem.endswith(
        "tensor model.norm.bias has no counterpart in LlamaForCausalLM; MaxText's decoder has no "
        "such bias, so it cannot train this model."
    )


def test_a_tensor_of_another_shape(place: Place) -> None:
    place.tensors(lambda tensors: tensors.update({NORM: tensors[NORM].reshape(6, 7)}))
    (problem,) = place.refused()
    assert 'decoder_norm/scale: model.norm.weight: "e -> e", e=42 does not fit' in problem


def test_a_truncated_and_a_missing_file(place: Place) -> None:
    first, second, *_ = sorted(place.hf.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    missing, truncated = place.refused()
    assert truncated.startswith(f"{first.name} is truncated: its header describes ")
    assert f"index.json in {place.hf} lists tensors in '{second.name}', not there" in missing


def test_an_unreadable_file(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    file = sorted(place.hf.glob("*.safetensors"))[0]
    file.chmod(0)
    if os.access(file, os.R_OK):  # root may read everything

        def as_a_user(path: Any, *args: Any, **kwargs: Any) -> Any:
            if os.path.exists(path) and not stat.S_IMODE(os.stat(path).st_mode):
                raise PermissionError(13, "Permission denied", str(path))
            return opens(path, *args, **kwargs)

        opens = os.open
        monkeypatch.setattr(os, "open", as_a_user)
    (problem,) = place.refused()
    assert problem.startswith(f"{file.name} in {place.hf} is not readable by this user")


# The words.


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("ici_fsdp_paralelism=8", "not a key of MaxText; did you mean ici_fsdp_parallelism?"),
        ("--verfy=full", "--verfy is not a flag; did you mean --verify?"),
        ("convert", "'convert' is not of the form key=value or --flag=value"),
        ("--verify=maybe", "verify=maybe is not one of none, sample, full"),
        ("scan_layers=perhaps", "scan_layers=perhaps is not true or false"),
        ("--save_dtype=float16", "not one of bfloat16, float32, float8_e4m3fn"),
        ("model_name=llama9", "model_name=llama9 is not supported."),
        ("ici_fsdp_parallelism=3", "does not fit the 8 devices"),
        ("ici_tensor_parallelism=3", "does not fit the 8 devices"),
        ("num_slices=2", "num_slices=2, but there are 1 slice"),
    ],
)
def test_a_wrong_word(place: Place, word: str, problem: str) -> None:
    (found,) = place.refused(word)
    assert problem in found


def test_no_such_yml(place: Place) -> None:
    place.words.insert(0, "none.yml")
    assert place.refused() == ["none.yml: no such file."]


def test_all_wrong_words_at_once(place: Place) -> None:
    assert len(place.refused("foo=1", "--bar", "scan_layers=2")) == 3


def test_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words, expected in {
        ("bogus",): "no command 'bogus'; commands are convert, export, relayout, plan, verify, ",
        ("verify",): "Give the checkpoint first: maxconv verify CHECKPOINT.",
        ("verify", f"{tmp_path}"): "is not a MaxText checkpoint: it has no 0/items/_METADATA.",
        ("inspect",): "Give one checkpoint: maxconv inspect PATH",
        ("inspect", f"{tmp_path}"): "is not a checkpoint",
    }.items():
        assert cli.main(words) == 2
        out, err = capsys.readouterr()
        assert not out and expected in err and err.startswith("maxconv: ") and err.count("\n") == 1
    for words in ((), ("--help",), ("convert", "-h")):
        assert cli.main(words) == (0 if words else 2)
        assert "maxconv convert [base.yml]" in capsys.readouterr().out


# The target.


def test_an_output_that_exists(place: Place) -> None:
    place.converts()
    (problem,) = place.refused()
    assert problem == (
        f"{place.out}/0 exists; add --overwrite to replace it, or name another directory."
    )
    old = snapshot(place.out)
    place.refused("--overwrite", "ici_fsdp_parallelism=3")  # leaves it as it is
    place.converts("--overwrite")
    assert snapshot(place.out).keys() != old.keys()  # data files have random names
    assert sorted(path.name for path in place.out.iterdir()) == ["0", "maxconv.json"]


def test_other_steps_are_left_alone(place: Place) -> None:
    place.converts()
    shutil.copytree(place.out / "0", place.out / "1000")
    before = snapshot(place.out / "1000")
    place.converts("--overwrite")
    assert snapshot(place.out / "1000") == before


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_only_a_checkpoint_is_overwritten(place: Place, kind: str) -> None:
    step = place.out / "0"
    if kind == "directory":
        (step / "thesis").mkdir(parents=True)
    else:
        place.out.mkdir()
        step.symlink_to(place.hf) if kind == "link" else step.write_text("thesis")
    assert "exists; add --overwrite" in place.refused()[0]
    (problem,) = place.refused("--overwrite")
    assert problem.startswith(
        f"{step} is not a MaxText checkpoint, so --overwrite does not replace it"
    )


def test_a_file_in_the_way(place: Place) -> None:
    place.out.write_text("")
    for path in (place.out, place.out / "below" / "it"):
        (problem,) = place.refused(f"base_output_directory={path}")
        assert problem == f"{place.out} is a file, but base_output_directory must be a directory."


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux")
def test_a_target_that_cannot_be_written_to(place: Place) -> None:
    (problem,) = place.refused("base_output_directory=/proc/out")
    assert problem.startswith("/proc cannot be written to (")


def test_a_target_of_another_user(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.out.mkdir()
    place.out.chmod(0o555)
    if os.access(place.out, os.W_OK):  # root may write everywhere

        def denied(**_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", denied)
    (problem,) = place.refused()
    assert problem.startswith(f"{place.out} cannot be written to (Permission denied)")


def test_no_room(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 20, 1 << 19, 1 << 19))
    (problem,) = place.refused()
    assert problem == (
        f"{place.directory} has 512.0 KiB free, but the checkpoint needs 1.1 MiB; free some "
        "space, or name another directory."
    )


def test_what_is_overwritten_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    (tmp_path / "maxconv.unfinished.json").write_text("{}")
    for name in ("0/items", "0.orbax-checkpoint-tmp/items"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "_METADATA").write_bytes(bytes(1 << 20))
    assert problems(str(tmp_path), 900_000, overwrite=True) == []
    (problem,) = problems(str(tmp_path), 1_100_000, overwrite=True)
    assert problem.startswith(f"{tmp_path} has 2.0 MiB free, but the checkpoint needs 2.1 MiB;")


def test_no_room_on_a_real_disk(place: Place, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk cannot be mounted here")
    try:
        (problem,) = place.refused(f"base_output_directory={disk}")
        assert problem.startswith(f"{disk} has 1.0 MiB free, but the checkpoint needs 1.1 MiB;")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        (problem,) = place.refused(f"base_output_directory={disk}/out")
        assert problem.startswith(f"{disk} cannot be written to (Read-only file system);")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_transformers_would_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    words = ("--lazy_load_tensors=False", "--eager_load_method=transformers")
    (problem,) = place.refused(*words)
    assert problem == (
        "--eager_load_method=transformers needs torch: pip install 'maxconv[transformers]', or "
        "remove the option to read the safetensors files directly."
    )


def test_a_target_of_another_kind(place: Place) -> None:
    (problem,) = place.refused("base_output_directory=s3://bucket/x")
    assert problem == (
        "s3://bucket/x is not supported; give a directory, or gs://BUCKET/DIRECTORY."
    )


def test_directories_are_made(place: Place) -> None:
    place.converts(f"base_output_directory={place.directory}/a/b/c")
    assert (place.directory / "a/b/c/0/items/_METADATA").exists()


def test_a_damaged_checkpoint(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    """That is no bad input: exit code 1, and no traceback either."""
    place.converts("checkpoint_storage_use_ocdbt=false")
    chunk = place.out / "0/items/params.params.decoder.decoder_norm.scale/c/0"
    raw = chunk.read_bytes()
    chunk.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    capsys.readouterr()
    assert cli.main(["verify", str(place.out)]) == 1
    out, err = capsys.readouterr()
    wrong, *problems = (line for line in err.splitlines() if not line.startswith("note: "))
    assert wrong == f"maxconv: {place.out}/0/items differs from its source; do not train from it."
    assert problems and not out
    assert all("params.params.decoder.decoder_norm.scale" in problem for problem in problems)


def test_sizes_that_the_tensors_contradict_are_named(tmp_path, capsys):
    model = tiny.write("qwen3-0.6b", tmp_path / "hf")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 53}))
    words = [f"--hf_model_path={model}", f"base_output_directory={tmp_path / 'out'}"]
    assert cli.main(["convert", *words, "hardware=cpu", "ici_fsdp_parallelism=8"]) == 2
    said = capsys.readouterr().err
    assert "mlp.gate_proj.weight" in said and "o=53 does not fit shape (52, 42)" in said
    assert not (tmp_path / "out").exists()
