"""The way back: what a checkpoint of MaxText becomes at Hugging Face, against the original.

Files are read by hand or with the safetensors library, checkpoints of other programs are written
with Orbax from numpy arrays.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
import tensorstore as ts
import tiny
from jobs import CPU, MESHES
from safetensors import safe_open
from test_processes import processes, said

from maxconv import cli, to_huggingface
from maxconv.config import parse
from maxconv.errors import UserError
from maxconv.jobs import convert

BF16 = np.dtype(ml_dtypes.bfloat16)
# Tensors whose bits a conversion to bfloat16 does not keep: a scale that is no power of two, and
# those that are published in float32.
SCALED = {
    "kimi-k2-1t": ".e_score_correction_bias",
    "deepseek3-671b": ".e_score_correction_bias",
    "deepseek3.2-671b": ".e_score_correction_bias",
    "gemma-2b": ("q_proj.weight", "embed_tokens.weight"),
    "gemma2-2b": ("q_proj.weight", "embed_tokens.weight"),
    "gemma3-4b": "embed_tokens.weight",
    "gemma3-4b+vision": "embed_tokens.weight",
    "gemma4-26b+vision": "embed_tokens.weight",
    "gemma4-31b": "embed_tokens.weight",
    "gemma4-e2b": "embed_tokens.weight",
    "gemma4-e4b": "embed_tokens.weight",
    "llama2-7b": "q_proj.weight",
    "llama3.1-8b": "q_proj.weight",
    "mistral-7b": "q_proj.weight",
    "mixtral-8x7b": "q_proj.weight",
}
FIRST = {
    *(("llama3.1-8b", False), ("mixtral-8x7b", True), ("gpt-oss-20b", True)),
    ("gemma2-2b", True),
}


def read(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor in files of a directory: dtype, shape and bytes."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        raw = file.read_bytes()
        data = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:data]).items():
            if name != "__metadata__":
                start, stop = (data + at for at in entry["data_offsets"])
                found[name] = entry["dtype"], tuple(entry["shape"]), raw[start:stop]
    return found


def numbers(tensor: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    dtype = {"BF16": BF16, "F32": np.dtype(np.float32)}[tensor[0]]
    return np.frombuffer(tensor[2], dtype).astype(np.float32)


def converted(case: str, scan: bool, directory: Path, *words: str) -> tuple[Path, Path]:
    """A checkpoint of Hugging Face, and what MaxText has of it."""
    model = tiny.write(case, directory / "hf")
    (model / "tokenizer.json").write_text('{"version": "1.0"}')
    (model / "chat_template.jinja").write_text("{{ messages }}")
    dtype = tiny.CASES[case].save_dtypes[0]
    given = [*tiny.maxtext_words(case, scan), *CPU, *MESHES["fsdp4_tp2"], "--verify=none"]
    given += [f"--hf_model_path={model}", f"base_output_directory={directory / 'out'}"]
    convert.run(parse([*given, f"--save_dtype={dtype}", *words]))
    return model, directory / "out"


def export(checkpoint: Path, model: Path, back: Path, *words: str) -> int:
    given = [f"--hf_model_path={model}", f"base_output_directory={back}", "--verify=full"]
    eight = ["--simulated_cpu_devices_count=8", *CPU]
    return cli.main(["export", str(checkpoint), *given, *eight, *words])


def cases() -> Iterator[Any]:
    """One layout of each case, but that one most of whose tensors are published in float32."""
    layouts = {case: scan for case, scan in reversed(tiny.LAYERS)} | dict(FIRST)
    for case, scan in layouts.items():
        if case != "deepseek4-284b":
            marks = () if (case, scan) in FIRST else pytest.mark.slow
            yield pytest.param(case, scan, marks=marks)


@pytest.mark.parametrize(("case", "scan"), [*cases()])
def test_the_way_back_gives_the_tensors_that_were_published(
    case: str, scan: bool, tmp_path: Path
) -> None:
    model, out = converted(case, scan, tmp_path)
    name = [word for word in tiny.maxtext_words(case, scan) if not word.startswith("scan_layers")]
    assert export(out, model, tmp_path / "back", *name) == 0
    before, after = read(model), read(tmp_path / "back")
    assert after.keys() == before.keys()
    for tensor, want in before.items():
        got = after[tensor]
        assert got[:2] == want[:2], tensor
        if tensor.endswith(SCALED.get(case, "no tensor")):
            step = float(ml_dtypes.finfo(BF16).eps)
            np.testing.assert_allclose(numbers(got), numbers(want), rtol=step)
        else:
            assert got == want, tensor
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "back" / file).read_bytes() == (model / file).read_bytes()


def test_the_order_of_a_named_llama_is_remembered(tmp_path: Path) -> None:
    """Its queries and keys are in another order than those of a llama without a name."""
    model, out = converted("llama2-7b", True, tmp_path)
    assert export(out, model, tmp_path / "back") == 0
    before, after = read(model), read(tmp_path / "back")
    for name, want in before.items():
        if name.endswith("q_proj.weight"):  # scaled, in bfloat16
            step = float(ml_dtypes.finfo(BF16).eps)
            np.testing.assert_allclose(numbers(after[name]), numbers(want), rtol=2 * step)
        else:
            assert after[name] == want, name


def test_float32_comes_back_as_numpy_divides(tmp_path: Path) -> None:
    model = tiny.write("llama3.1-8b", tmp_path / "hf", dtype="float32")
    given = [*tiny.maxtext_words("llama3.1-8b", True), *CPU, *MESHES["fsdp8"], "--verify=none"]
    given += [f"--hf_model_path={model}", f"base_output_directory={tmp_path / 'out'}"]
    convert.run(parse([*given, "--save_dtype=float32"]))
    assert export(tmp_path / "out", model, tmp_path / "back") == 0
    before, after = read(model), read(tmp_path / "back")
    head_dim = json.loads((model / "config.json").read_text())["head_dim"]
    factor = np.float32(1 / np.sqrt(head_dim))
    for name, want in before.items():
        if name.endswith("q_proj.weight"):
            stored = numbers(want) * factor
            np.testing.assert_array_equal(numbers(after[name]), stored / factor)
        else:
            assert after[name] == want, name


def trained(out: Path, to: Path, step: int) -> None:
    """What a trainer leaves of a converted checkpoint: weights in float32, and its own state."""
    restored = ocp_v0.PyTreeCheckpointer().restore(out / "0/items")
    params = jax.tree.map(lambda x: np.asarray(x, np.float32) * np.float32(1.5), restored["params"])
    zeros = jax.tree.map(np.zeros_like, params)
    optimizer = {"mu": zeros, "nu": zeros, "count": np.int32(step)}
    state = {"params": params, "opt_state": optimizer, "step": np.int32(step)}
    state["nnx_aux"] = {"model": {"decoder": {"dropout": {"rngs": {"count": np.uint32(1)}}}}}
    handler = ocp_v0.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    ocp_v0.Checkpointer(handler).save(
        to / str(step) / "items",
        args=ocp_v0.args.PyTreeSave(state),
    )


@pytest.mark.filterwarnings("ignore:Sharding info")
def test_a_training_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its last step, without the optimizer's state, rounded to the published dtype."""
    model, out = converted("qwen3-0.6b", True, tmp_path)
    run = tmp_path / "run"
    for step in (2, 10):
        trained(out, run / "checkpoints", step)
    before = bytes_read()
    given = [f"--hf_model_path={model}", f"base_output_directory={tmp_path / 'back'}"]
    assert cli.main(["export", str(run), *given, *CPU, "--verify=none"]) == 0
    stored = sum(4 * tiny_size for tiny_size in map(size_of, read(model).values()))
    assert bytes_read() - before < 1.3 * stored  # compressed chunks, each once, and the metadata
    after = read(tmp_path / "back")
    for name, want in read(model).items():
        expected = (numbers(want) * np.float32(1.5)).astype(BF16).tobytes()
        assert after[name] == (*want[:2], expected), name
    capsys.readouterr()
    assert cli.main(["export", str(run), *given, *CPU, "--overwrite", "--step=3"]) == 2
    assert "is not step 3 of a checkpoint" in capsys.readouterr().err
    assert read(tmp_path / "back") == after


def size_of(tensor: tuple[str, tuple[int, ...], bytes]) -> int:
    return int(np.prod(tensor[1]))


def bytes_read() -> int:
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def test_files_and_their_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = converted("qwen2.5-1.5b", False, tmp_path)
    back = tmp_path / "back"
    assert export(out, model, back, "--max_shard_size=40KB") == 0
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    for name, file in index["weight_map"].items():
        with safe_open(back / file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"} and name in opened.keys()
    sizes = [len(data) for _, _, data in read(back).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert max((back / file).stat().st_size for file in files) < max(40_000, max(sizes)) + 10_000
    capsys.readouterr()
    assert export(out, model, back) == 2
    assert f"{back} holds {files[0]}; add --overwrite" in capsys.readouterr().err
    assert export(out, model, back, "--overwrite") == 0
    assert [path.name for path in back.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (back / "maxconv.unfinished").exists()


@pytest.mark.parametrize("change", ["lacks", "no checkpoint", "no model"])
def test_what_does_not_fit_is_named(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = converted("qwen3-0.6b", False, tmp_path)
    if change == "lacks":
        other, checkpoint = tiny.write("qwen3-8b", tmp_path / "other"), out
        said = "lacks 'decoder.logits_dense.kernel'"
    elif change == "no checkpoint":
        other, checkpoint, said = model, tmp_path, "is not a checkpoint that Orbax saved"
    else:
        other, checkpoint, said = tmp_path / "none", out, "does not exist"
    assert export(checkpoint, other, tmp_path / "back") == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


def test_a_byte_that_differs_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = converted("qwen3-0.6b", True, tmp_path)
    from maxconv.jobs import export as job

    def damage(export: Any, reporter: Any) -> None:
        file = tmp_path / "back/model.safetensors"
        raw = bytearray(file.read_bytes())
        raw[-3] ^= 4
        file.write_bytes(raw)
        checked(export, reporter)

    checked = job.check
    monkeypatch.setattr(job, "check", damage)
    assert export(out, model, tmp_path / "back") == 1
    assert "according to numpy" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_write_files_of_their_own(tmp_path: Path) -> None:
    model, out = converted("qwen3-30b-a3b", True, tmp_path)
    back, logs = tmp_path / "back", tmp_path / "logs"
    program = "from maxconv import cli; cli.script()"
    words = ["export", str(out), f"--hf_model_path={model}", f"base_output_directory={back}"]
    words += ["hardware=cpu", "--simulated_cpu_devices_count=4", "--verify=full"]
    with processes(2, words, logs, program) as running:
        assert [process.wait(300) for process in running] == [0, 0], said(logs)
    assert read(back) == read(model)
    sizes = [path.stat().st_size for path in sorted(back.glob("*.safetensors"))]
    assert len(sizes) == 2 and max(sizes) < 1.2 * min(sizes)


OTHER_COPY = """
import sys
if sys.argv[-1] == "--process_id=1":
    from maxconv.sources import local
    init = local.LocalSource.__init__
    local.LocalSource.__init__ = lambda self, path, *more: (
        init(self, sys.argv[1] if str(path) == sys.argv[2] else path, *more)
    )
from maxconv import cli
sys.exit(cli.main(["export", *sys.argv[3:]]))
"""


@pytest.mark.slow
def test_another_copy_of_the_model_is_not_mixed_in(tmp_path: Path) -> None:
    """A tensor that is only copied would be of one copy or the other, by the process."""
    model, out = converted("qwen3-0.6b", True, tmp_path)
    other = shutil.copytree(model, tmp_path / "other")
    file = sorted(other.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    back, logs = tmp_path / "back", tmp_path / "logs"
    words = [str(other), str(model), str(out), f"--hf_model_path={model}", "hardware=cpu"]
    words += [f"base_output_directory={back}", "--simulated_cpu_devices_count=4"]
    with processes(2, words, logs, OTHER_COPY) as running:
        assert [process.wait(300) for process in running] == [2, 2], said(logs)
    for log in logs.iterdir():
        assert f"the content of {file.name} is" in log.read_text(), log.read_text()
    assert not back.exists()


def test_the_arguments_of_maxtext(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its to_huggingface takes them, which has no dtype but one for all."""
    model, out = converted("qwen3-0.6b", True, tmp_path)
    given = [word for word in tiny.maxtext_words("qwen3-0.6b", True) if "override" not in word]
    given = ["to_huggingface", "base.yml", *given, f"load_parameters_path={out}/0/items"]
    given += ["--override_model_architecture", f"base_output_directory={tmp_path / 'back'}"]
    given += [f"--hf_model_path={model}", "weight_dtype=float32", *CPU]
    to_huggingface.main(given)
    after = read(tmp_path / "back")
    for name, want in read(model).items():
        assert after[name] == ("F32", want[1], numbers(want).tobytes()), name
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert config == json.loads((model / "config.json").read_text()) | {"torch_dtype": "float32"}
    assert "config.json: torch_dtype is float32 instead of bfloat16" in capsys.readouterr().err
    for word, sentence in (
        ("scan_layers=false", "scan_layers=False, but the layers of .* are stacked"),
        ("lora.lora_restore_path=/x", "/x is not a checkpoint that Orbax saved"),
        (f"base_output_directory={model}", "is the model that names are taken from"),
        (f"base_output_directory={tmp_path / 'back'}", "add --overwrite"),
        ("load_parameters_path=", "Give the checkpoint first"),
    ):
        others = [w for w in given if w.partition("=")[0] != word.partition("=")[0]]
        with pytest.raises(UserError, match=sentence):
            to_huggingface.main([*others, word])
    assert read(tmp_path / "back") == after


@pytest.mark.slow
def test_fp8_that_was_kept_is_not_cast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = "qwen3.5-35b-a3b-fp8"
    model, out = converted(case, True, tmp_path)
    words = [w for w in tiny.maxtext_words(case, True) if not w.startswith("scan_layers")]
    assert export(out, model, tmp_path / "back", *words, "--save_dtype=bfloat16") == 2
    assert "has fp8 weights with their scales" in capsys.readouterr().err
    assert export(out, model, tmp_path / "back", *words, "--save_dtype=float8_e4m3fn") == 0
    assert read(tmp_path / "back") == read(model)
