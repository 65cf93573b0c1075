"""A LoRA adapter is merged into the weights while they are converted, or converted by itself."""

import json
import math
from dataclasses import fields, replace

import ml_dtypes
import numpy as np
import pytest
import tiny
from headers import published
from jobs import CPU, evaluated, job_words
from plans import make_leaf
from safetensors.numpy import load_file, save_file

from maxconv.config import parse
from maxconv.config.tables import known_models, model_facts
from maxconv.errors import UserError
from maxconv.execution.engine import Engine
from maxconv.families import matters
from maxconv.jobs.convert import run
from maxconv.jobs.prepare import prepared
from maxconv.models.adapters import described
from maxconv.models.resolve import resolve

CASE = "llama3.1-8b"
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


@pytest.fixture
def base(tmp_path):
    return tiny.write(CASE, tmp_path / "base", "float32", shard_bytes=None)


def write_adapter(directory, base, rank=4, more=None, **config):
    """An adapter as PEFT saves it, and the float64 sum that it stands for."""
    random = np.random.default_rng(0)
    weights = load_file(base / "model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "bias": "none"} | config
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    parts, want = {}, dict(weights)
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not module.endswith(ADAPTED):
            continue
        a = random.standard_normal((rank, weight.shape[1]), np.float32)
        b = random.standard_normal((weight.shape[0], rank), np.float32)
        at = f"base_model.model.{module}"
        parts |= {f"{at}.lora_A.weight": a, f"{at}.lora_B.weight": b}
        want[name] = weight + scaling * (b.astype(np.float64) @ a)
    directory.mkdir()
    save_file(parts | (more or {}), directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return {name: x.astype(np.float32) for name, x in want.items()}


def leaves(directory, model, *more):
    words = job_words(directory, model, tiny.maxtext_words(CASE, True), "fsdp4_tp2", more)
    with prepared(parse([*words, "--save_dtype=float32"])) as job:
        with Engine(job.plan, job.source, window=1 << 20) as engine:
            made = {leaf.name: np.asarray(make_leaf(engine, leaf)) for leaf in job.plan.leaves}
            assert job.source.stats.bytes_read == job.plan.read_nbytes(0)
    return made


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}])
def test_the_result_is_that_of_merged_weights(config, base, tmp_path):
    want = write_adapter(tmp_path / "adapter", base, **config)
    plain = leaves(tmp_path, base)
    ours = leaves(tmp_path, base, f"hf_lora_adapter_path={tmp_path / 'adapter'}")
    save_file(want, base / "model.safetensors")
    theirs = leaves(tmp_path, base)
    for name, leaf in theirs.items():
        np.testing.assert_allclose(ours[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)
    changed = {name for name in plain if not np.array_equal(plain[name], ours[name])}
    kernels = ("self_attention.query", "self_attention.value", "mlp.wo")
    assert changed == {f"params.params.decoder.layers.{at}.kernel" for at in kernels}


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"use_dora": True}, {}, "use_dora=true is not supported"),
        ({}, {"base_model.model.lm_head.weight": (2, 2)}, "lm_head.weight .*matches no weight"),
        ({}, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": (4, 42)}, "layers.9"),
        ({}, {"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": (4, 42)}, "no lora_B"),
        ({}, {"model.layers.0.self_attn.q_proj.lora_A.weight": (4, 41)}, "are the same tensor"),
    ],
)
def test_what_fits_nothing_is_named(config, more, said, base, tmp_path):
    parts = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in more.items()}
    write_adapter(tmp_path / "adapter", base, more=parts, **config)
    with pytest.raises(UserError, match=said):
        leaves(tmp_path, base, f"hf_lora_adapter_path={tmp_path / 'adapter'}")


ALONE = [
    ("llama3.1-8b", "linear"),
    ("gemma2-2b", "attention"),  # MaxText does not scale its queries
    ("mixtral-8x7b", "experts"),
    ("qwen3-30b-a3b", "linear"),
    ("deepseek2-16b", "attention"),
    ("qwen3-vl-2b", "vision"),
]


@pytest.mark.parametrize(
    ("case", "adapter", "scan"),
    [(c, a, scan) for c, a in ALONE for scan in (True, False) if tiny.CASES[c].scans or not scan],
)
def test_an_adapter_alone_is_what_merging_adds(case, adapter, scan, tmp_path):
    base = tiny.write(case, tmp_path / "base", "float32")
    lora = tiny.write_adapter(case, adapter, tmp_path / "adapter")
    words = [*tiny.maxtext_words(case, scan), "--save_dtype=float32"]
    merged = [f"hf_lora_adapter_path={lora}"]
    without, with_it = (evaluated(tmp_path, base, words, more) for more in ([], merged))
    alone = evaluated(tmp_path, lora, words, key="hf_lora_adapter_path")
    adapted = {name.partition(".kernel_lora_")[0] for name in alone}
    assert adapted and adapted <= {name.removesuffix(".kernel") for name in without}
    for name, leaf in without.items():
        at = name.removesuffix(".kernel")
        if at not in adapted:
            np.testing.assert_array_equal(with_it[name], leaf, err_msg=name)
            continue
        a, b = (alone[f"{at}.kernel_lora_{part}.value"] for part in "ab")
        want = (with_it[name] - leaf) / (6 / tiny.RANK)
        if a.ndim == 3 and not name.endswith(("wi_0", "wi_1", "wo")):  # (inputs, layers, rank)
            want = np.moveaxis(want, 1, 0)
            got = np.einsum("ilr,rlo->lio", a, b).reshape(want.shape)
        else:
            got = (a @ b).reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"use_dora": True}, {}, "use_dora=true is not supported"),
        ({"rank_pattern": {"q_proj": 2}}, {}, "rank_pattern is not supported"),
        ({"r": 8}, {}, "r=8, but the tensors have rank 4"),
        ({}, {"base_model.model.lm_head.weight": (2, 2)}, "lm_head.weight .*matches no weight"),
        ({}, {"model.embed_tokens.lora_embedding_A": (4, 256)}, "embed_tokens.* matches no weight"),
        ({}, {"model.layers.9.mlp.up_proj.lora_A.weight": (4, 42)}, "layers.9.* matches no weight"),
        ({}, {"model.layers.0.mlp.up_proj.lora_A.weight": (4, 42)}, "there is no lora_B"),
    ],
)
def test_what_an_adapter_alone_cannot_have_is_named(config, more, said, base, tmp_path):
    parts = {name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in more.items()}
    write_adapter(tmp_path / "adapter", base, more=parts, **config)
    words = tiny.maxtext_words(CASE, True)
    with pytest.raises(UserError, match=said):
        evaluated(tmp_path, tmp_path / "adapter", words, key="hf_lora_adapter_path")


def test_an_adapter_of_another_size_is_named(tmp_path):
    tiny.write_adapter(CASE, "some", tmp_path / "adapter")
    words = tiny.maxtext_words(CASE, True, base_emb_dim=41)
    with pytest.raises(UserError, match="q_proj.lora_A.* does not fit shape"):
        evaluated(tmp_path, tmp_path / "adapter", words, key="hf_lora_adapter_path")


def test_an_adapter_alone_needs_the_name_of_its_model(tmp_path):
    tiny.write_adapter(CASE, "some", tmp_path / "adapter")
    words = [*CPU, f"hf_lora_adapter_path={tmp_path / 'adapter'}"]
    with pytest.raises(UserError, match="model_name="):
        with prepared(parse([*words, f"base_output_directory={tmp_path / 'out'}"])):
            pass


def test_maxtext_is_told_rank_and_alpha(base, tmp_path):
    write_adapter(tmp_path / "adapter", base, use_rslora=True)
    words = [*tiny.maxtext_words(CASE, True), "--verify=full"]
    line = job_words(tmp_path, tmp_path / "adapter", words, "fsdp8", key="hf_lora_adapter_path")
    config = run(parse(line)).config
    place = tmp_path / "out" / CASE / "adapter"  # MaxText's
    assert config.base_output_directory == str(place)
    stored = json.loads((place / "0" / "_CHECKPOINT_METADATA").read_text())
    assert stored["custom_metadata"] == {
        "scan_layers": True,
        # MaxText scales by alpha / rank
        "lora": {"lora_rank": 4, "lora_alpha": pytest.approx(6 * math.sqrt(4))},
    }


@pytest.mark.slow
def test_a_model_has_the_sizes_that_maxtext_says():
    models = reversed([*known_models().items()])
    kinds = {(m["architecture"], m["decoder_block"]): name for name, m in models}
    for name in kinds.values():
        facts = {"mtp_num_layers": 0, **(model_facts(name) or {})}
        if facts["decoder_block"] in ("gemma4_small", "deepseek4"):
            with pytest.raises(UserError, match=f"of {name}"):
                described(name, facts)
            continue
        found = described(name, facts)[1]
        want = resolve(published(name), name, facts, {}).dims
        if facts["decoder_block"] == "gemma4":  # MaxText does not say these, nor is there a use
            want = replace(want, moe_mlp=found.moe_mlp, keys_are_values=False)
        spare = [f.name for f in fields(want) if not matters(f, want)]
        assert found == replace(want, **{name: getattr(found, name) for name in spare})
