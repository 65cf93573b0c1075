"""LoRA adapters that MaxText trained: as PEFT saves them, or merged into the weights they adapt."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp_v0
import pytest
import tiny
from jobs import CPU, MESHES
from safetensors.numpy import load_file
from test_export import converted, export, numbers, read

from maxconv import cli
from maxconv.config import parse
from maxconv.jobs import convert

SLOW = pytest.mark.slow
Arrays = dict[str, np.ndarray]


def words(case: str, scan: bool) -> list[str]:
    return [w for w in tiny.maxtext_words(case, scan) if not w.startswith("scan_layers")]


def adapter(case: str, name: str, scan: bool, directory: Path, dtype: str) -> tuple[Path, Path]:
    """An adapter of PEFT, and what MaxText has of it."""
    lora = tiny.write_adapter(case, name, directory / "lora")
    given = [*tiny.maxtext_words(case, scan), *CPU, *MESHES["fsdp8"], "--verify=none"]
    given += [f"hf_lora_adapter_path={lora}", f"base_output_directory={directory / 'adapter'}"]
    done = convert.run(parse([*given, f"--save_dtype={dtype}"]))
    return lora, Path(done.config.base_output_directory)


@pytest.mark.parametrize(
    ("case", "name", "scan", "dtype"),
    [
        ("qwen3-8b", "linear", True, "bfloat16"),
        ("llama3.1-8b", "some", False, "float32"),
        pytest.param("qwen3-30b-a3b", "linear", True, "bfloat16", marks=SLOW),
        pytest.param("mixtral-8x7b", "experts", False, "bfloat16", marks=SLOW),
        pytest.param("deepseek2-16b", "attention", True, "float32", marks=SLOW),
        pytest.param("gemma3-4b", "language", True, "bfloat16", marks=SLOW),
        pytest.param("qwen3-next-80b-a3b", "attention", True, "bfloat16", marks=SLOW),
    ],
)
def test_an_adapter_comes_back(case, name, scan, dtype, tmp_path: Path) -> None:
    """Bit for bit, in the dtype in which MaxText has it."""
    lora, trained = adapter(case, name, scan, tmp_path, dtype)
    model, back = tiny.write(case, tmp_path / "hf"), tmp_path / "back"
    assert export(trained, model, back, *words(case, scan)) == 0
    assert sorted(p.name for p in back.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "maxconv.json",
    ]
    want, got = (load_file(at / "adapter_model.safetensors") for at in (lora, back))
    if case.startswith("gemma3"):  # as transformers 5 has it in memory
        want = {
            n.replace("language_model.model", "model.language_model"): x for n, x in want.items()
        }
    assert got.keys() == want.keys()
    for tensor, x in want.items():
        expected = x.astype(tiny.DTYPES[dtype])
        if case.startswith("llama") and ".q_proj.lora_B" in tensor:
            np.testing.assert_allclose(got[tensor], expected, rtol=2e-7)
        else:
            assert got[tensor].tobytes() == expected.tobytes(), tensor
    config = json.loads((back / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model)
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (tiny.RANK, 6, "LORA")


MERGED = [
    ("llama3.1-8b", "some", True, "float32", ()),
    ("llama3.1-8b", "linear", True, "bfloat16", ()),
    ("qwen3-vl-2b", "vision", False, "bfloat16", ("use_multimodal=True",)),
    ("mixtral-8x7b", "experts", True, "float32", ("--names=transformers",)),
    ("mixtral-8x7b", "experts", False, "bfloat16", ()),
    ("deepseek2-16b", "attention", True, "bfloat16", ()),
    ("gemma2-2b", "linear", True, "float32", ()),
]


@pytest.mark.parametrize(
    ("case", "name", "scan", "dtype", "more"),
    [*MERGED[:1], *(pytest.param(*m, marks=SLOW) for m in MERGED[1:])],
)
def test_an_adapter_is_merged(case, name, scan, dtype, more, tmp_path: Path) -> None:
    """Into what is exported without it: W + alpha / r * B A, rounded once."""
    model, out = converted(case, scan, tmp_path, "--save_dtype=float32")
    lora, trained = adapter(case, name, scan, tmp_path, "float32")
    given = [w for w in words(case, scan) if not w.startswith("use_")]
    plain, back = tmp_path / "plain", tmp_path / "back"
    assert export(out, model, plain, "--save_dtype=float32", *given) == 0
    merged = [f"lora.lora_restore_path={trained}", f"--save_dtype={dtype}"]
    merged += [word for word in more if word.startswith("--")]
    assert export(out, model, back, *merged, *given) == 0
    parts = load_file(lora / "adapter_model.safetensors")
    want = {n: numbers(x).reshape(x[1]) for n, x in read(plain).items()}
    for part in [part for part in parts if ".lora_A." in part]:
        a, b = (parts[p].astype(np.float64) for p in (part, part.replace("lora_A", "lora_B")))
        module = part.removeprefix("base_model.model.").partition(".lora_")[0]
        want[f"{module}.weight"] = want[f"{module}.weight"] + 6 / tiny.RANK * (b @ a)
    if "--names=transformers" in more:
        want = fused(want)
    found = read(back)
    assert found.keys() == want.keys()
    for tensor, x in want.items():
        got, eps = numbers(found[tensor]).reshape(x.shape), float(np.finfo(np.float32).eps)
        if dtype == "bfloat16":  # half a step, where a whole one would be two roundings
            eps = float(ml_dtypes.finfo(ml_dtypes.bfloat16).eps) / 2
        np.testing.assert_allclose(got, x, rtol=1.01 * eps, atol=1e-5 * np.abs(x).max())


def fused(weights: Arrays) -> Arrays:
    """Mixtral's experts as transformers 5 has them in memory."""
    found = {name.replace("block_sparse_moe", "mlp"): x for name, x in weights.items()}
    for layer in {name.partition(".experts.")[0] for name in found if ".experts." in name}:
        experts = [
            [found.pop(f"{layer}.experts.{e}.w{i}.weight") for e in range(5)] for i in (1, 3, 2)
        ]
        gate, up, down = map(np.stack, experts)
        found[f"{layer}.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{layer}.experts.down_proj"] = down
    return found


def restored(items: Path) -> Arrays:
    """Every leaf of a checkpoint, by its path."""
    tree = ocp_v0.PyTreeCheckpointer().restore(items)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree["params"])
    return {"/".join(str(key.key) for key in path): np.asarray(x) for path, x in flat}


def saved(leaves: Arrays, directory: Path, **state: Any) -> Path:
    """Leaves by path, as the trainers of MaxText save them."""
    params: dict[str, Any] = {}
    for path, x in leaves.items():
        *parents, last = path.split("/")
        inner = params
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[last] = x
    handler = ocp_v0.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    args = ocp_v0.args.PyTreeSave({"params": params, **state})
    ocp_v0.Checkpointer(handler).save(directory / "items", args=args)
    return directory


def first(leaves: Arrays) -> Arrays:
    """Factors with layers on axis 0, and no `value` below them."""
    return {n.removesuffix("/value"): np.moveaxis(x, 1, 0) for n, x in leaves.items()}


@pytest.mark.filterwarnings("ignore:Sharding info")
def test_what_trainers_save(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Factors stacked on axis 0, beside an optimizer's state, and no word about alpha."""
    case = "qwen3-8b"
    lora, trained = adapter(case, "attention", True, tmp_path, "float32")
    model, moved = tiny.write(case, tmp_path / "hf"), first(restored(trained / "0/items"))
    zeros = {"mu": {"decoder": {"kernel_lora_a": np.zeros(3, np.float32)}}, "count": np.int32(1)}
    run = saved(moved, tmp_path / "run/checkpoints/7", opt_state=zeros, step=np.int32(7))
    assert export(run.parents[1], model, tmp_path / "a", *words(case, True)) == 2
    assert "does not say lora_alpha; add lora.lora_alpha=" in capsys.readouterr().err
    alpha = ["lora.lora_alpha=6"]
    assert export(run.parents[1], model, tmp_path / "a", *alpha, *words(case, True)) == 0
    want, got = (load_file(d / "adapter_model.safetensors") for d in (lora, tmp_path / "a"))
    assert got.keys() == want.keys()
    assert all(got[name].tobytes() == x.tobytes() for name, x in want.items())


@SLOW
@pytest.mark.filterwarnings("ignore:Sharding info")
def test_factors_beside_kernels_are_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, alpha = "qwen3-8b", ["lora.lora_alpha=6"]
    _, trained = adapter(case, "linear", True, tmp_path, "float32")
    model, out = converted(case, True, tmp_path, "--save_dtype=float32")
    moved = first(restored(trained / "0/items"))
    both = saved(restored(out / "0/items") | moved, tmp_path / "both")
    given = [*words(case, True), "--save_dtype=float32"]
    assert export(both, model, tmp_path / "b", *alpha, *given) == 0
    merged = f"lora.lora_restore_path={trained}/0/items"
    assert export(out, model, tmp_path / "c", merged, *given) == 0
    assert read(tmp_path / "b") == read(tmp_path / "c") != read(model)
    capsys.readouterr()
    assert export(out, model, tmp_path / "d", merged, "lora.lora_alpha=8", *given) == 2
    assert "lora_alpha is 6 and 8" in capsys.readouterr().err


def drop(leaves: Arrays) -> Arrays:
    return {n: x for n, x in leaves.items() if "query/kernel_lora_b" not in n}


def cut(leaves: Arrays) -> Arrays:
    return {n: x[..., 1:] if "key/kernel_lora_b" in n else x for n, x in leaves.items()}


def rename(leaves: Arrays) -> Arrays:
    return {n.replace("query", "other"): x for n, x in leaves.items()}


@pytest.mark.filterwarnings("ignore:Sharding info")
def test_what_does_not_fit_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = "qwen3-8b"
    _, trained = adapter(case, "attention", False, tmp_path, "float32")
    model, out = converted(case, False, tmp_path)
    leaves = restored(trained / "0/items")
    for i, (change, said) in enumerate(
        {
            drop: "has only one of the two factors of decoder.layers_0.self_attention.query",
            cut: "key.kernel_lora_b .*has shape",
            rename: "factors of 'decoder.layers_0.self_attention.other'",
        }.items()
    ):
        damaged = saved(change(leaves), tmp_path / f"{i}")
        for first in ([str(damaged)], [str(out), f"--lora_restore_path={damaged}"]):
            given = [*first, f"--hf_model_path={model}", *words(case, False), "--lora_alpha=6"]
            back = tmp_path / "back"
            assert cli.main(["export", *given, *CPU, f"base_output_directory={back}"]) == 2
            assert re.search(said, capsys.readouterr().err), said
    given = [str(out), f"--lora_restore_path={out}", f"--hf_model_path={model}", *CPU]
    assert cli.main(["export", *given, f"base_output_directory={tmp_path / 'back'}"]) == 2
    assert "has no LoRA factors" in capsys.readouterr().err
    assert not (tmp_path / "back").exists()


@SLOW
def test_kernels_that_are_parts_of_one_weight_can_only_be_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "qwen3-vl-2b"
    _, trained = adapter(case, "vision", False, tmp_path, "float32")
    model = tiny.write(case, tmp_path / "hf")
    assert export(trained, model, tmp_path / "back", *words(case, False)) == 2
    assert "of which PEFT has a single factor; add load_parameters_path=" in capsys.readouterr().err
