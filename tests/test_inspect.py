"""What `maxconv inspect` shows, and that it starts nothing for it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxconv.cli.inspect import Stored, describe, fold
from maxconv.errors import UserError
from maxconv.targets import orbax

HUGGING_FACE = """\
Hugging Face checkpoint {root}
  LlamaForCausalLM: hidden_size=42, intermediate_size=52, num_hidden_layers=3, \
num_attention_heads=6, num_key_value_heads=2, head_dim=10, vocab_size=259, tie_word_embeddings=False
  4 files, model-00001-of-00004.safetensors to model-00004-of-00004.safetensors

model.embed_tokens.weight                            (259, 42)     bfloat16  21.2 KiB
model.layers.{{0..2}}.input_layernorm.weight           3 x (42,)     bfloat16  252 B
model.layers.{{0..2}}.mlp.down_proj.weight             3 x (42, 52)  bfloat16  12.8 KiB
model.layers.{{0..2}}.mlp.gate_proj.weight             3 x (52, 42)  bfloat16  12.8 KiB
model.layers.{{0..2}}.mlp.up_proj.weight               3 x (52, 42)  bfloat16  12.8 KiB
model.layers.{{0..2}}.post_attention_layernorm.weight  3 x (42,)     bfloat16  252 B
model.layers.{{0..2}}.self_attn.k_proj.weight          3 x (20, 42)  bfloat16  4.9 KiB
model.layers.{{0..2}}.self_attn.o_proj.weight          3 x (42, 60)  bfloat16  14.8 KiB
model.layers.{{0..2}}.self_attn.q_proj.weight          3 x (60, 42)  bfloat16  14.8 KiB
model.layers.{{0..2}}.self_attn.v_proj.weight          3 x (20, 42)  bfloat16  4.9 KiB
model.norm.weight                                    (42,)         bfloat16  84 B
lm_head.weight                                       (259, 42)     bfloat16  21.2 KiB

30 tensors, 61,866 elements, 120.8 KiB"""

ORBAX = """\
Orbax checkpoint {items}
  step 0, {storage}
  scan_layers=False
  saved from mesh x=4 y=2
  opt_state: Dict, without arrays

step                         ()            int64     8 B                        chunk ()
params.params.bias           (7,)          float32   28 B   P()                 chunk (7,)
params.params.layers_{{0..1}}  2 x (16, 6)   bfloat16  384 B  P('x', 'y')         chunk (4, 3)
params.params.table          (3, 2, 8, 2)  bfloat16  192 B  P(None, None, 'x')  chunk (3, 1, 2, 2)

5 tensors, 296 elements, 612 B"""


@pytest.fixture(scope="module")
def arrays() -> list[tuple[tuple[str, ...], jax.Array]]:
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def zeros(shape: tuple[int, ...], dtype: str, *spec: str | None) -> jax.Array:
        return jax.device_put(jnp.zeros(shape, dtype), NamedSharding(mesh, P(*spec)))

    return [
        (("params", "bias"), zeros((7,), "float32")),
        (("params", "layers_0"), zeros((16, 6), "bfloat16", "x", "y")),
        (("params", "layers_1"), zeros((16, 6), "bfloat16", "x", "y")),
        (("params", "table"), zeros((3, 2, 8, 2), "bfloat16", None, None, "x")),
    ]


def save(
    out: Path,
    leaves: list[tuple[tuple[str, ...], jax.Array]],
    ocdbt: bool = True,
    zarr3: bool = True,
) -> Path:
    context = orbax.context(ocdbt, zarr3)
    state = orbax.train_state({".".join(("params", *path)): leaf for path, leaf in leaves})
    orbax.save(str(out), state, False, 1 << 20, orbax.Progress(), context)
    return out / "0" / "items"


def test_hugging_face(tmp_path: Path) -> None:
    tiny.write("llama3.1-8b", tmp_path)
    assert describe(str(tmp_path)) == HUGGING_FACE.format(root=tmp_path)


@pytest.mark.parametrize(
    ("ocdbt", "zarr3", "storage"),
    [
        (True, True, "OCDBT, zarr3"),
        (True, False, "OCDBT, zarr2"),
        (False, True, "files, zarr3"),
        (False, False, "files, zarr2"),
    ],
)
def test_orbax(tmp_path: Path, arrays, ocdbt: bool, zarr3: bool, storage: str) -> None:
    items = save(tmp_path / "out", arrays, ocdbt, zarr3)
    for path in (tmp_path / "out", items.parent, items):
        assert describe(str(path)) == ORBAX.format(items=items, storage=storage)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_path_from_another_directory(
    tmp_path: Path, arrays, ocdbt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "out", arrays, ocdbt)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "5 tensors" in describe("../out")


def test_the_last_step_of_a_training_run(tmp_path: Path) -> None:
    from orbax.checkpoint import v1 as ocp

    moments = {"mu": {"kernel": np.zeros((4, 2), np.float32)}, "count": np.zeros((), np.int32)}
    state = {"params": {"kernel": np.zeros((4, 2), np.float32)}, "opt_state": [moments, None]}
    with ocp.training.Checkpointer(str(tmp_path)) as checkpointer:
        for step in (9, 10):
            checkpointer.save_checkpointables(step, {"items": state})
    lines = describe(str(tmp_path)).splitlines()
    assert lines[:2] == [f"Orbax checkpoint {tmp_path}/10/items", "  step 10, OCDBT, zarr3"]
    names = {line.split()[0] for line in lines if "chunk" in line}
    assert names == {"params.kernel", "opt_state.0.mu.kernel", "opt_state.0.count"}


def test_it_is_quick_because_it_imports_no_jax(tmp_path: Path, arrays) -> None:
    program = (
        "import sys; from maxconv.cli.inspect import describe; print(describe(sys.argv[1]));"
        "assert not {'jax', 'orbax'} & set(sys.modules)"
    )
    items = save(tmp_path / "out", arrays)
    command = [sys.executable, "-c", program, str(items)]
    assert "5 tensors" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_names_fold_only_when_all_numbers_combine() -> None:
    one = Stored("", (2,), "int8", 2)

    def folded(*names: str) -> list[tuple[str, int]]:
        return [(n, len(same)) for n, same in fold(replace(one, name=name) for name in names)]

    assert folded(*(f"l.{i}.e.{j}.w" for i in (1, 2, 3, 7) for j in (0, 1))) == [
        ("l.{1..3,7}.e.{0..1}.w", 8)
    ]
    assert folded("l.0.e.0.w", "l.0.e.1.w", "l.1.e.0.w") == [
        ("l.0.e.0.w", 1),
        ("l.0.e.1.w", 1),
        ("l.1.e.0.w", 1),
    ]
    assert folded("l.5.e.0.w", "l.5.e.1.w") == [("l.5.e.{0..1}.w", 2)]
    assert folded("mlp.wi_0.kernel", "mlp.wi_1.kernel") == [
        ("mlp.wi_0.kernel", 1),
        ("mlp.wi_1.kernel", 1),
    ]
    assert folded("moe_layers_0.w", "moe_layers_1.w") == [("moe_layers_{0..1}.w", 2)]
    different = fold([replace(one, name="l.0.w"), replace(one, name="l.1.w", dtype="uint8")])
    assert [name for name, _ in different] == ["l.0.w", "l.1.w"]


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a checkpoint: it has neither Hugging Face files"):
        describe(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        describe(str(tmp_path / "nowhere"))
    (tmp_path / "0.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(UserError, match="0.orbax-checkpoint-tmp, an unfinished save"):
        describe(str(tmp_path))


def test_damage(tmp_path: Path, arrays) -> None:
    items = save(tmp_path / "out", arrays)
    (node,) = (items / "d").iterdir()
    raw = bytearray(node.read_bytes())
    raw[40] ^= 1
    node.write_bytes(raw)
    with pytest.raises(UserError, match=f"is damaged: .*{node.name}.*; save the checkpoint again"):
        describe(str(items))
    metadata = json.loads((items / "_METADATA").read_text())
    (items / "_METADATA").write_text(json.dumps({**metadata, "tree_metadata": None}))
    with pytest.raises(UserError, match="is damaged"):
        describe(str(items))
    (items / "_METADATA").write_text("{")
    with pytest.raises(UserError, match="_METADATA is not a JSON object"):
        describe(str(items))
