"""What an export writes: names of tensors, and which of them are in which file."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from headers import published
from test_export import BF16, converted, export, read

from maxconv.config import parse
from maxconv.config.argv import Size
from maxconv.errors import UserError
from maxconv.models.architecture import family_of
from maxconv.models.views import in_memory, unpacked
from maxconv.sources import LocalSource
from maxconv.targets import shards

SLOW = pytest.mark.slow
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]


def words(case: str, scan: bool) -> list[str]:
    return [w for w in tiny.maxtext_words(case, scan) if not w.startswith("scan_layers")]


def test_files_are_those_of_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Byte for byte: names of files, and names, order and values of the tensors in each."""
    model, out = converted("qwen3-30b-a3b", True, tmp_path)
    files = sorted(model.glob("*.safetensors"))
    assert len(files) > 2
    renamed = {file.name: f"part {i}.safetensors" for i, file in enumerate(files)}
    text = (model / "model.safetensors.index.json").read_text()
    for old, new in renamed.items():
        (model / old).rename(model / new)
        text = text.replace(old, new)
    (model / "model.safetensors.index.json").write_text(text)
    back = tmp_path / "back"
    assert export(out, model, back, "--layout=source", *words("qwen3-30b-a3b", True)) == 0
    assert sorted(file.name for file in back.glob("*.safetensors")) == sorted(renamed.values())
    for name in renamed.values():
        assert (back / name).read_bytes() == (model / name).read_bytes(), name
    where = json.loads((back / "model.safetensors.index.json").read_text())["weight_map"]
    assert where == json.loads(text)["weight_map"]
    assert export(out, model, back, "--layout=source", "--max_shard_size=1GB") == 2
    assert "no effect with --layout=source" in capsys.readouterr().err


@SLOW
def test_weights_that_were_packed_lie_where_their_parts_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a single file keeps its name, which then needs an index."""
    model, out = converted("gpt-oss-20b+mxfp4", True, tmp_path)
    given = words("gpt-oss-20b+mxfp4", True)
    config = json.loads((model / "config.json").read_text())
    stored = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    assert export(out, model, tmp_path / "a", "--layout=source", *given) == 0
    made = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())["weight_map"]
    unpacked = {n.removesuffix("_blocks"): f for n, f in stored.items() if "_scales" not in n}
    assert made == unpacked
    after = read(tmp_path / "a")
    one = tiny.write("gpt-oss-20b+mxfp4", tmp_path / "one", shard_bytes=None)
    (one / "model.safetensors").rename(one / "other.safetensors")
    (one / "config.json").write_text(
        json.dumps(config | {"transformers_weights": "other.safetensors"})
    )
    capsys.readouterr()
    assert export(out, one, tmp_path / "b", "--layout=source", *given) == 0
    assert "transformers_weights is taken out" in capsys.readouterr().err
    assert "transformers_weights" not in json.loads((tmp_path / "b/config.json").read_text())
    made = json.loads((tmp_path / "b/model.safetensors.index.json").read_text())["weight_map"]
    assert set(made.values()) == {"other.safetensors"}
    assert read(tmp_path / "b") == after


@pytest.mark.parametrize("name", ["llama3.1-70b", "gemma3-27b"])
def test_files_are_no_larger_than_asked_and_can_be_as_they_were(name: str) -> None:
    tensors = [shards.Tensor(n, i.dtype, i.shape) for n, i in published(name).tensors.items()]
    for count in (1, 2, 4):
        owners = {tensor.name: i % count for i, tensor in enumerate(tensors)}
        files = shards.by_size(tensors, 5 * 10**9, owners)
        same = {t.name: (file.name, i) for file in files for i, t in enumerate(file.tensors)}
        assert sorted(same) == sorted(t.name for t in tensors)
        assert all(sum(t.nbytes for t in file.tensors) <= 5 * 10**9 for file in files)
        assert all({owners[t.name] for t in file.tensors} == {file.process} for file in files)
        again = shards.as_stored(tensors, same, range(count))
        assert [(f.name, f.tensors) for f in again] == [(f.name, f.tensors) for f in files]
        nbytes = [sum(f.nbytes for f in again if f.process == p) for p in range(count)]
        assert max(nbytes) - min(nbytes) <= max(file.nbytes for file in files)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("5GB", 5 * 10**9), ("1.5 GiB", 3 << 29), ("200mb", 2 * 10**8), ("40KB", 40_000), ("7", 7)],
)
def test_sizes_are_written_as_transformers_takes_them(text: str, nbytes: int) -> None:
    assert Size(text) == nbytes
    assert parse([f"--max_shard_size={text}"]).max_shard_size == nbytes


@pytest.mark.parametrize("text", ["five", "5XB", "-1GB", "0", "1e9", "9999999TB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="max_shard_size="):
        parse([f"--max_shard_size={text}"])


def array(tensor: tuple[str, tuple[int, ...], bytes]) -> np.ndarray:
    return np.frombuffer(tensor[2], {"BF16": BF16, "F32": np.float32}[tensor[0]]).reshape(tensor[1])


def together(tensors: Tensors, layer: str, gate: str, up: str, down: str) -> Tensors:
    """The experts of a layer in one tensor, as modeling_mixtral.py of transformers 5 has them."""

    def every(part: str) -> list[np.ndarray]:
        names = [f"{layer}.experts.{e}.{part}.weight" for e in range(len(tensors))]
        return [array(tensors.pop(name)) for name in names if name in tensors]

    halves = [np.concatenate(both) for both in zip(every(gate), every(up), strict=True)]
    found = {"gate_up_proj": np.stack(halves), "down_proj": np.stack(every(down))}
    return {
        f"{layer}.experts.{name}": ("BF16", made.shape, made.tobytes())
        for name, made in found.items()
    }


def mixtral(tensors: Tensors) -> Tensors:
    layers = {n[: n.index(".experts")] for n in tensors if ".experts." in n}
    for layer in sorted(layers):
        tensors |= together(tensors, layer, "w1", "w3", "w2")
    return {name.replace(".block_sparse_moe.", ".mlp."): x for name, x in tensors.items()}


def qwen3_vl_moe(tensors: Tensors) -> Tensors:
    for name in [name for name in tensors if ".experts." in name]:
        turned = np.ascontiguousarray(array(tensors[name]).swapaxes(1, 2))
        tensors[name] = "BF16", turned.shape, turned.tobytes()
    return tensors


def gemma3(tensors: Tensors) -> Tensors:
    names = {
        "language_model.model.": "model.language_model.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    found = {}
    for name, tensor in tensors.items():
        old = next(old for old in names if name.startswith(old))
        found[names[old] + name.removeprefix(old)] = tensor
    return found


@pytest.mark.parametrize(
    ("case", "scan", "renamed", "off"),
    [
        ("mixtral-8x7b", True, mixtral, "q_proj.weight"),
        pytest.param("mixtral-8x7b", False, mixtral, "q_proj.weight", marks=SLOW),
        pytest.param("qwen3-vl-30b-a3b", False, qwen3_vl_moe, "none", marks=SLOW),
        pytest.param("gemma3-4b", True, gemma3, "embed_tokens.weight", marks=SLOW),
    ],
)
def test_names_of_transformers(case, scan, renamed, off, tmp_path: Path) -> None:
    model, out = converted(case, scan, tmp_path)
    given = words(case, scan)
    assert export(out, model, tmp_path / "back", "--names=transformers", *given) == 0
    want, found = renamed(read(model)), read(tmp_path / "back")
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        assert found[name][:2] == tensor[:2], name
        if not name.endswith(off):  # their bits a conversion does not keep
            assert found[name] == tensor, name
    # The export is a model like any other: as MODEL, it gives its own names; and with its layout.
    shutil.copy(model / "config.json", tmp_path / "back/config.json")
    assert export(out, tmp_path / "back", tmp_path / "again", *given, "--layout=source") == 0
    assert read(tmp_path / "again") == found


@pytest.mark.parametrize("case", ["deepseek4-284b", "qwen3-omni-30b-a3b", "weaver-mini"])
def test_names_that_are_not_known_are_refused(case: str, tmp_path: Path) -> None:
    with LocalSource(tiny.write(case, tmp_path)) as source:
        family = family_of(source)
        with pytest.raises(UserError, match=f"not known for {family.architectures[0]}"):
            in_memory(unpacked(source), source, family)
