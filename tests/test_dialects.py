"""Checkpoints as other programs leave them: each kind over several families, against numpy."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from dialects import BF16, HEAD, TABLE, Checkpoint, same
from jobs import job_words
from safetensors.numpy import load_file, save_file

from maxconv.config import parse
from maxconv.errors import UserError
from maxconv.jobs.prepare import prepared
from maxconv.to_maxtext import get_maxtext_model_info

LOGITS = "params.params.decoder.logits_dense.kernel"


@pytest.mark.parametrize("case", ["qwen2.5-1.5b", "qwen3-0.6b"])
def test_a_head_beside_a_tied_table(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    c.save({**c.tensors, HEAD: c.tensors[TABLE]})
    leaves, notices = c.converted()
    same(leaves, plain)
    assert any("is the embedding table" in n for n in notices)
    other = c.tensors[TABLE].copy()
    other[-1, -1] += 1  # one value of all
    c.save({**c.tensors, HEAD: other})
    assert "logits_via_embedding=True" in c.refused()
    leaves, notices = c.converted("logits_via_embedding=False")
    rows = other.shape[0]
    np.testing.assert_array_equal(leaves[LOGITS][:, :rows], other.T)
    assert any("lm_head.weight is kept" in n for n in notices)
    info, _ = get_maxtext_model_info(c.config("logits_via_embedding=False"))
    assert LOGITS.removeprefix("params.").replace(".", "-") in info
    head_alone = {HEAD if n == TABLE else n: x for n, x in c.tensors.items()}
    c.save(head_alone)
    same(c.converted()[0], plain)


@pytest.mark.parametrize("case", ["gemma2-2b", "gemma3-4b"])
def test_a_gemma_is_tied_where_nothing_says_so(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    table = next(n for n in c.tensors if n.endswith("embed_tokens.weight"))
    head = HEAD if table == TABLE else "language_model.lm_head.weight"
    c.save({**c.tensors, head: c.tensors[table]})
    c.entries(tie_word_embeddings=None)
    same(c.converted()[0], plain)


@pytest.mark.parametrize("case", ["llama3.1-8b", "mistral-7b", "qwen3-30b-a3b"])
def test_a_head_that_is_missing_or_of_another_height(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    c.save({n: x for n, x in c.tensors.items() if n != HEAD})
    for said in (False, None):
        c.entries(tie_word_embeddings=said)
        assert "has no lm_head.weight, but tie_word_embeddings is" in c.refused()
    c.save({**c.tensors, HEAD: np.concatenate([c.tensors[HEAD], c.tensors[HEAD][:2]])})
    assert "but lm_head.weight is" in c.refused()


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen3-8b", "gemma3-4b"])
def test_prefixes_that_all_names_have_or_lack(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    for prefix in ("_orig_mod.", "module.", "base.model."):
        c.save({prefix + n: x for n, x in c.tensors.items()})
        leaves, notices = c.converted()
        same(leaves, plain)
        assert any(prefix in n for n in notices)
    c.save({n.replace("layers.0.", "layers.0._orig_mod."): x for n, x in c.tensors.items()})
    same(c.converted()[0], plain)


@pytest.mark.parametrize(
    ("case", "base"), [("llama3.1-8b", "LlamaModel"), ("qwen3-0.6b", "Qwen3Model")]
)
def test_a_base_without_a_head(case: str, base: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    c.entries(architectures=[base], model_type=None)
    c.save({n.removeprefix("model."): x for n, x in c.tensors.items() if n != HEAD})
    leaves, notices = c.converted("logits_via_embedding=True")
    assert LOGITS not in leaves
    assert any(f"{base} is read as a" in n and "without a head" in n for n in notices)


@pytest.mark.parametrize("case", ["mistral-7b", "qwen3-30b-a3b"])
def test_without_architectures_the_model_type_decides(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    c.entries(architectures=None)
    leaves, notices = c.converted()
    same(leaves, plain)
    assert any("model_type=" in n for n in notices)
    c.entries(model_type=None)
    leaves, notices = c.converted()  # then what model_name is
    same(leaves, plain)
    assert any("model_name makes it" in n for n in notices)


@pytest.mark.parametrize("case", ["qwen2.5-7b", "mixtral-8x7b"])
def test_what_is_no_weight_is_left_out(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    at = "model.layers.0.self_attn"
    one = np.ones(1, np.float32)
    more = (f"{at}.rotary_emb.inv_freq", "v_head.summary.weight", f"{at}.k_scale")
    c.save({**c.tensors, **dict.fromkeys(more, one), f"{at}.q_proj.input_scale": one})
    leaves, notices = c.converted()
    same(leaves, plain)
    (told,) = [n for n in notices if "no weights" in n]
    assert all(part in told for part in ("inv_freq", "v_head", "k_scale", "input_scale"))


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen2.5-7b"])
def test_what_is_no_whole_model_is_named(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    name = "model.layers.0.self_attn.v_proj.weight"
    part = np.ones((2, 2), BF16)
    c.save({"base_model.model." + name.replace("weight", "lora_A.weight"): part})
    assert "hf_lora_adapter_path=" in c.refused()
    c.save({**c.tensors, name.replace("weight", "lora_A.default.weight"): part})
    assert "merge it with PEFT" in c.refused()
    c.save({**c.tensors, name: np.zeros(0, BF16)})
    problem = c.refused()
    assert name in problem and "ZeRO-3" in problem


def test_rows_of_the_table_are_cut_only_when_told(tmp_path: Path) -> None:
    for case in ("qwen2.5-7b", "olmo3-7b"):
        c = Checkpoint(case, tmp_path / case)
        words = [w for w in tiny.maxtext_words(case, True) if not w.startswith("vocab_size=")]
        rows = 160_000  # more than MaxText's models have
        ends = {
            n: np.zeros((rows, x.shape[1]), BF16)
            for n, x in c.tensors.items()
            if n in (TABLE, HEAD)
        }
        c.save({**c.tensors, **ends})
        c.entries(vocab_size=rows)
        line = job_words(tmp_path, c.hf, words, "fsdp8")
        with pytest.raises(UserError, match=f"vocab_size={rows}"), prepared(parse(line)):
            pass
        with prepared(parse([*line, f"vocab_size={rows}"])):
            pass


@pytest.mark.parametrize("case", ["mistral-7b", "qwen3-8b"])
def test_files_that_are_none_of_the_models(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    plain, _ = c.converted()
    names = [*c.tensors]
    for i in range(2):
        part = {n: c.tensors[n] for n in names[i::2]}
        save_file(part, c.hf / f"model-0000{i + 1}-of-00002.safetensors")
        (c.hf / f"._model-0000{i + 1}-of-00002.safetensors").write_bytes(b"\0\5\x16\7Mac OS X")
    (c.hf / "model.safetensors").unlink()
    save_file({"tok_embeddings.weight": c.tensors[TABLE]}, c.hf / "consolidated.safetensors")
    path = c.hf / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    leaves, notices = c.converted()
    same(leaves, plain)
    assert any("'consolidated.safetensors' is not read" in n for n in notices)


ADAPTED = "model.layers.0.self_attn.q_proj"


def write_adapter(directory: Path, parts: Mapping[str, np.ndarray], **entries: Any) -> str:
    directory.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | entries
    (directory / "adapter_config.json").write_text(json.dumps(config))
    save_file(dict(parts), directory / "adapter_model.safetensors")
    return f"hf_lora_adapter_path={directory}"


def parts_of(module: str, weight: np.ndarray, own: str = "") -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    rows, columns = weight.shape
    return {
        f"base_model.model.{module}.lora_A{own}.weight": random.random((2, columns), np.float32),
        f"base_model.model.{module}.lora_B{own}.weight": random.random((rows, 2), np.float32),
    }


@pytest.mark.parametrize("case", ["llama3.1-8b", "mistral-7b", "qwen3-8b"])
def test_whole_weights_of_an_adapter_replace_the_models(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    new = {n: (c.tensors[n].astype(np.float32) * 3).astype(BF16) for n in (TABLE, HEAD)}
    parts = parts_of(ADAPTED, c.tensors[f"{ADAPTED}.weight"], ".default")
    b, a = (parts[f"base_model.model.{ADAPTED}.lora_{x}.default.weight"] for x in "BA")
    added = c.tensors[f"{ADAPTED}.weight"].astype(np.float32) + 2 * (b @ a)
    parts |= {f"base_model.model.{HEAD}": new[HEAD]}
    at = "base_model.model.model.embed_tokens."
    parts |= {f"{at}modules_to_save.default.weight": new[TABLE]}
    leaves, _ = c.converted(write_adapter(tmp_path / "a", parts, modules_to_save=["lm_head"]))
    c.save({**c.tensors, **new, f"{ADAPTED}.weight": added})
    want, _ = c.converted()
    for name, x in want.items():
        np.testing.assert_allclose(leaves[name].astype("f4"), x.astype("f4"), rtol=2**-6, atol=1e-3)


@pytest.mark.parametrize("case", ["llama3.1-8b", "qwen2.5-7b"])
@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_kasa": True}, "use_kasa"),
        ({"lora_alpha": None}, "lora_alpha is null"),
    ],
)
def test_an_adapter_that_is_no_plain_sum(
    case: str, entries: Mapping[str, Any], said: str, tmp_path: Path
) -> None:
    c = Checkpoint(case, tmp_path)
    parts = parts_of(ADAPTED, c.tensors[f"{ADAPTED}.weight"])
    assert said in c.refused(write_adapter(tmp_path / "a", parts, **entries))
    empty = {name: np.zeros(0, np.float32) for name in parts}
    assert "q_proj" in c.refused(write_adapter(tmp_path / "a", empty))
    assert "has no tensors" in c.refused(write_adapter(tmp_path / "a", {}))


@pytest.mark.parametrize("case", ["qwen2.5-1.5b", "qwen3-0.6b"])
def test_an_adapter_of_a_tied_head(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    adapter = write_adapter(tmp_path / "a", parts_of("lm_head", c.tensors[TABLE]))
    for tensors in (c.tensors, {**c.tensors, HEAD: c.tensors[TABLE]}):
        c.save(tensors)
        problem = c.refused(adapter)
        assert "adapts lm_head" in problem and "tie_word_embeddings" in problem


@pytest.mark.parametrize("case", ["gemma3-4b", "gemma4-31b", "gemma4-e4b", "qwen3.5-35b-a3b"])
def test_an_adapter_of_what_is_left_out(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    if case == "gemma4-e4b":  # whose encoders MaxText has not
        c.save({**c.tensors, "model.vision_tower.layers.0.q.weight": np.ones((4, 4), BF16)})
        c.tensors = load_file(c.hf / "model.safetensors")
    towers = [n for n in c.tensors if "vis" in n and n.endswith(".weight") and ".0." in n]
    tower = next(n for n in towers if c.tensors[n].ndim == 2)
    parts = parts_of(tower.removesuffix(".weight"), c.tensors[tower])
    whole = {"base_model.model." + tower: c.tensors[tower]}
    plain, _ = c.converted()
    mend = "add use_multimodal=True to include them"
    for name, stored in (("a", parts), ("b", whole)):
        problem = c.refused(write_adapter(tmp_path / name, stored))
        assert f"{len(stored)} of its {len(stored)} tensors adapt weights that are left" in problem
        assert (mend in problem) == (case != "gemma4-e4b")
    queries = [n for n in c.tensors if n.endswith("self_attn.q_proj.weight")]
    kept = next(n for n in queries if "vis" not in n)
    more = parts_of(kept.removesuffix(".weight"), c.tensors[kept])
    leaves, notices = c.converted(write_adapter(tmp_path / "c", parts | more))
    assert leaves.keys() == plain.keys()
    (note,) = [n for n in notices if "2 of its 4 tensors adapt weights that are left out" in n]
    assert min(parts) in note and (mend in note) == (case != "gemma4-e4b")


@pytest.mark.parametrize("case", ["llama3.1-8b", "mistral-7b", "qwen3-8b"])
def test_the_first_pattern_that_fits_gives_alpha(case: str, tmp_path: Path) -> None:
    c = Checkpoint(case, tmp_path)
    parts, merged = {}, dict(c.tensors)
    patterns = {"layers.0.self_attn.q_proj": 3, "up_proj": 6, "q_proj": 10, "layers.0.*": 77}
    adapted = {"0.self_attn.q_proj": 3, "1.self_attn.q_proj": 10, "1.mlp.up_proj": 6}
    for module, alpha in adapted.items():
        name = f"model.layers.{module}"
        own = parts_of(name, c.tensors[f"{name}.weight"])
        b, a = (own[f"base_model.model.{name}.lora_{x}.weight"].astype("f8") for x in "BA")
        merged[f"{name}.weight"] = (c.tensors[f"{name}.weight"] + alpha / 2 * (b @ a)).astype("f4")
        parts |= own
    leaves, _ = c.converted(write_adapter(tmp_path / "a", parts, alpha_pattern=patterns))
    c.save(merged)
    want, _ = c.converted()
    assert leaves.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(leaves[name].astype("f4"), x.astype("f4"), rtol=2**-7, atol=1e-3)
