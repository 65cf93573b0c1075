"""What MaxText's real trainer saves, exported: the arrays that Orbax restores, tensor by tensor.

Runs in the environment that `environment.sh` makes, with maxconv installed in it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import load_logits  # noqa: E402
import told  # noqa: E402
from test_smollm2 import run  # noqa: E402
from test_tiny_logits import converted  # noqa: E402

from maxconv.sources.trees import TreeSource  # noqa: E402

NAME = "llama3.1-8b"
MANY = os.environ.get("MAXCONV_ALL_LOGITS")
MESH = ("ici_fsdp_parallelism=2", "ici_data_parallelism=4")
TRAIN = (
    *("run_name=tiny", "steps=3", "checkpoint_period=2", "enable_checkpointing=true"),
    *("async_checkpointing=false", "dataset_type=synthetic", "per_device_batch_size=1"),
    *("max_target_length=32", "hardware=cpu", "skip_jax_distributed_system=True", "jax_cache_dir="),
    *("attention=dot_product", "learning_rate=0.01", "weight_dtype=float32"),
    *MESH,
)
ENV = {
    "JAX_DEFAULT_PRNG_IMPL": "unsafe_rbg",
    "XLA_FLAGS": load_logits.XLA_FLAGS,
    "JAX_PLATFORMS": "cpu",
    "HF_HUB_OFFLINE": "1",
}


def restored(items: Path) -> dict:
    """The parameters of a checkpoint, as Orbax restores them by itself."""
    handler = ocp.PyTreeCheckpointer()
    tree = handler.metadata(items).item_metadata.tree
    import jax

    plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return handler.restore(items, restore_args=plain)["params"]["params"]


def expected(params: dict, scan: bool, layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Llama's tensors, made of MaxText's parameters with numpy alone."""
    decoder = params["decoder"]
    yield "model.embed_tokens.weight", params["token_embedder"]["embedding"]
    yield "model.norm.weight", decoder["decoder_norm"]["scale"]
    yield "lm_head.weight", decoder["logits_dense"]["kernel"].T

    for i in range(layers):

        def leaf(path: str, i: int = i) -> np.ndarray:
            found = decoder["layers" if scan else f"layers_{i}"]
            for part in path.split("/"):
                found = found[part]
            return found[:, i] if scan else found

        at, attention = f"model.layers.{i}.", "self_attention"
        yield f"{at}input_layernorm.weight", leaf("pre_self_attention_layer_norm/scale")
        yield f"{at}post_attention_layernorm.weight", leaf("post_self_attention_layer_norm/scale")
        for theirs, ours in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo")):
            yield f"{at}mlp.{theirs}_proj.weight", leaf(f"mlp/{ours}/kernel").T
        for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
            kernel = leaf(f"{attention}/{part}/kernel")  # (embedding, heads, head_dim)
            if letter != "v":  # transformers rotates halves, MaxText neighbours
                kernel = np.concatenate([kernel[..., 0::2], kernel[..., 1::2]], axis=-1)
            if letter == "q":
                kernel = kernel / np.float32(1 / np.sqrt(kernel.shape[-1]))
            yield f"{at}self_attn.{letter}_proj.weight", kernel.reshape(len(kernel), -1).T
        out = leaf(f"{attention}/out/kernel")
        yield f"{at}self_attn.o_proj.weight", out.reshape(-1, out.shape[-1]).T


@pytest.mark.parametrize("scan", [True, False], ids=["scan", "unscan"])
def test_a_run_of_maxtext(scan: bool, tmp_path: Path) -> None:
    """Two steps with Adam from our conversion; its last step, and an earlier one, in float32."""
    model = told.write(NAME, tmp_path / "hf", "float32")
    command = converted(model, tmp_path / "out", scan)
    base = f"base_output_directory={tmp_path / 'run'}"
    run("-m", "maxtext.trainers.pre_train.train", *command, *TRAIN, base, env=ENV)
    steps = tmp_path / "run/tiny/checkpoints"
    assert {path.name for path in steps.iterdir() if path.name.isdigit()} == {"0", "2"}
    before = load_files(model)
    seen = []
    for step in (None, 0) if scan else (None,):
        back = tmp_path / f"back{step}"
        exported(steps.parent, model, back, *([] if step is None else [f"--step={step}"]))
        after = load_files(back)
        want = dict(expected(restored(steps / f"{2 if step is None else step}/items"), scan, 3))
        assert after.keys() == want.keys() == before.keys()
        for name, tensor in want.items():
            assert after[name].dtype == np.float32
            np.testing.assert_array_equal(after[name], tensor, name)
        seen.append(after["model.norm.weight"])
        assert not np.array_equal(seen[-1], before["model.norm.weight"])
        assert (back / "config.json").read_bytes() == (model / "config.json").read_bytes()
    assert not scan or not np.array_equal(*seen)  # it has trained in between


def test_training_goes_on_in_another_layout(tmp_path: Path) -> None:
    """Two steps with Adam, layers one by one; then two more, also with the layers stacked."""
    model = told.write(NAME, tmp_path / "hf", "float32")
    command = converted(model, tmp_path / "out", scan=False)
    trained, words = "maxtext.trainers.pre_train.train", [*command, *TRAIN]
    run("-m", trained, *words, f"base_output_directory={tmp_path / 'run'}", env=ENV)
    steps = tmp_path / "run/tiny/checkpoints"
    printed = run(
        *("-m", "maxconv.cli", "relayout", steps, "scan_layers=true", "--train_state"),
        *(f"--hf_model_path={model}", f"base_output_directory={tmp_path / 'stacked'}"),
        *("hardware=cpu", "--verify=full", *MESH),
    )
    (line,) = (line for line in printed.splitlines() if line.startswith("to train"))
    stacked = shlex.split(line.partition(f"{trained} ")[2])
    plain = [word for word in words if not word.startswith("load_parameters_path=")]
    losses = {}
    for kind, more in {
        "as it was": [*plain, f"load_full_state_path={steps / '2/items'}"],
        "stacked": [*stacked, *(word for word in TRAIN if word not in stacked)],
    }.items():
        metrics, here = tmp_path / f"{kind}.jsonl", tmp_path / kind
        more = [word for word in more if not word.startswith("steps=")]
        own = ["steps=5", f"base_output_directory={here}", f"metrics_file={metrics}"]
        run("-m", trained, *more, *own, env=ENV)
        found = [json.loads(text) for text in metrics.read_text().splitlines()]
        losses[kind] = [(step["step"], step["learning/loss"]) for step in found]
    assert [step for step, _ in losses["as it was"]] == [3, 4]
    assert losses["stacked"] == losses["as it was"]


@pytest.mark.parametrize("scan", [True, False] if MANY else [True])
def test_states_of_nnx(scan: bool, tmp_path: Path) -> None:
    """What MaxText's model is in SFT and in RL: the same tensors as of the plain checkpoint."""
    model = told.write(NAME, tmp_path / "hf", "float32")
    command = converted(model, tmp_path / "out", scan)
    words = [word for word in command if not word.startswith("load_parameters_path=")]
    layers = "--scan" if scan else "--no-scan"
    items = tmp_path / "out/0/items"
    into = tmp_path / "states"
    run(HERE / "save_states.py", items, into, "--hf", model, *words, *MESH, layers)
    with TreeSource(str(items)) as plain:
        for kind in ("sft", "rl"):
            with TreeSource(str(tmp_path / "states" / kind)) as tree:
                assert tree.tensors.keys() == plain.tensors.keys()
                for name in plain.tensors:
                    np.testing.assert_array_equal(tree.tensor(name), plain.tensor(name), name)


def exported(checkpoint: Path, model: Path, back: Path, *more: str) -> None:
    run(
        *("-m", "maxconv.cli", "export", checkpoint, f"--hf_model_path={model}", "hardware=cpu"),
        *(f"base_output_directory={back}", "--save_dtype=float32", "--verify=full", *more),
    )


def load_files(directory: Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}
