import pickle
from pathlib import Path

import pytest

from maxconv import cli
from maxconv.config import Config, config_path, model_facts, parse
from maxconv.config.argv import convert
from maxconv.config.tables import MODEL_KEYS, defaults, known_models, maxtext_keys
from maxconv.errors import UserError


def read(line: str = "", **environ: str) -> Config:
    return parse(line.split(), environ)


def problems(line: str, **environ: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        parse(line.split(), environ)
    return error.value.problems


def problem(line: str, **environ: str) -> str:
    (only,) = problems(line, **environ)
    return only


def test_defaults_are_maxtexts() -> None:
    config = read()
    assert config.model_name is None
    assert config.base_output_directory == str(Path.cwd() / "mt_output")
    assert (config.scan_layers, config.param_scan_axis) == (True, 1)
    assert (config.checkpoint_storage_use_ocdbt, config.checkpoint_storage_use_zarr3) == (True,) * 2
    assert (config.hardware, config.hf_access_token, config.hf_model_path) == ("tpu", None, None)
    assert (config.save_dtype, config.verify, config.lazy_load_tensors) == (
        "bfloat16",
        "sample",
        True,
    )
    assert config.simulated_cpu_devices_count == 16
    assert len(config.parallelism) == 26
    assert {k for k, v in config.parallelism.items() if v == -1} == {
        "ici_fsdp_parallelism",
        "dcn_data_parallelism",
    }
    assert len(config.mesh_axes) == 12
    assert config.notices == () and config.overrides == {}


@pytest.mark.parametrize(
    "line",
    [
        "base.yml model_name=qwen3-0.6b scan_layers=false --save_dtype=float32 --revision=main",
        "maxtext/configs/base.yml --save_dtype float32 model_name=qwen3-0.6b --revision main "
        "scan_layers=False",
        "--revision main src/maxtext/configs/base.yml scan_layers=n save_dtype=float32 "
        "model_name=qwen3-0.6b",
        "scan_layers=0 --lazy_load_tensors revision=main model_name=default "
        "model_name=qwen3-0.6b --save_dtype=float32",
    ],
)
def test_forms_of_a_command_line(line: str) -> None:
    config = read(line)
    assert (config.model_name, config.scan_layers) == ("qwen3-0.6b", False)
    assert (config.save_dtype, config.revision) == ("float32", "main")
    assert config.lazy_load_tensors


@pytest.mark.parametrize("word", ["True", "t", "yes", "Y", "1"])
@pytest.mark.parametrize("form", ["--overwrite {}", "--overwrite={}", "overwrite={}"])
def test_true(form: str, word: str) -> None:
    assert read(form.format(word)).overwrite


@pytest.mark.parametrize("word", ["False", "f", "no", "N", "0"])
@pytest.mark.parametrize(
    "form", ["--lazy_load_tensors {}", "--lazy_load_tensors={}", "lazy_load_tensors={}"]
)
def test_false(form: str, word: str) -> None:
    assert not read(f"{form.format(word)} scan_layers=true").lazy_load_tensors


def test_a_bare_boolean_flag_is_true() -> None:
    config = read("--overwrite scan_layers=false --use_compression --verify none")
    assert config.overwrite and config.use_compression
    assert (config.scan_layers, config.verify) == (False, "none")


def test_values_keep_their_equal_signs() -> None:
    assert read("--hf_model_path=gs://b/x=y").hf_model_path == "gs://b/x=y"


def test_output_directory() -> None:
    assert read("base_output_directory=gs://b/c/").base_output_directory == "gs://b/c"
    assert read("base_output_directory=a/../b").base_output_directory == str(Path.cwd() / "b")
    assert read("base_output_directory=~/b").base_output_directory == str(Path.home() / "b")
    assert read("base_output_directory=").base_output_directory == str(Path.cwd() / "mt_output")


def test_environment() -> None:
    config = read("model_name=qwen3-0.6b", M_SCAN_LAYERS="False", M_ICI_TENSOR_PARALLELISM="2")
    assert not config.scan_layers
    assert config.parallelism["ici_tensor_parallelism"] == 2
    assert "M_SCAN_LAYERS" in problem("scan_layers=true", M_SCAN_LAYERS="true")
    assert "true or false" in problem("", M_SCAN_LAYERS="maybe")


def test_overrides() -> None:
    line = "model_name=qwen3-0.6b base_emb_dim=64 logits_via_embedding=true"
    assert problem(line) == (
        "base_emb_dim=64 differs from 1024, that of qwen3-0.6b; remove it, or add "
        "override_model_config=True"
    )
    config = read(f"{line} override_model_config=True")
    assert config.overrides == {"base_emb_dim": 64, "logits_via_embedding": True}
    assert read("base_emb_dim=64 vocab_size=32_000").overrides == {
        "base_emb_dim": 64,
        "vocab_size": 32000,
    }


def test_secrets_are_not_shown() -> None:
    config = read("hf_access_token=hf_secret")
    assert config.hf_access_token == "hf_secret"
    assert "hf_secret" not in repr(config) + str(config.notices)
    assert "`ps`" in config.notices[0]
    assert read("", M_HF_ACCESS_TOKEN="hf_secret").notices == ()
    for line in (
        "--hf_access_token hf_secret",
        "--hf_access_token=hf_secret",
        "hf_acess_token=hf_secret",
        "hf_secret",
        "hf_access_token hf_secret",
    ):
        assert "hf_secret" not in str(problems(line))


def test_keys_without_meaning_are_one_notice() -> None:
    config = read("run_name=x steps=5 lora.lora_rank=8 attention=dot_product scan_layers=true")
    assert config.notices == (
        "Arguments that have no effect on a conversion: attention, lora.lora_rank, run_name, "
        "steps.",
    )
    (notice,) = read("custom_mesh_and_rule=pure-fsdp").notices
    assert "custom_mesh_and_rule is not read" in notice
    assert "no mesh axis" in read("ici_sequence_parallelism=2").notices[0]


def test_all_problems_at_once() -> None:
    assert problems("scan_layer=true --lazy-load=1 scan_layers=maybe junk param_scan_axis=x") == (
        "--lazy-load is not a flag; did you mean --lazy_load_tensors?",
        "'junk' is not of the form key=value or --flag=value",
        "scan_layer is not a key of MaxText; did you mean scan_layers?",
        "scan_layers=maybe is not true or false",
        "param_scan_axis=x is not a whole number",
    )


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--scan_layers=true", "scan_layers=..."),
        ("--revision", "no value"),
        ("--revision --overwrite", "no value"),
        ("--lazy_load_tensors maybe", "'maybe'"),
        ("scan_layers=true base.yml", "'base.yml'"),
        ("nowhere.yml", "no such file"),
        ("--unheard_of value", "--unheard_of is not a flag"),
        ("=5", "'=5'"),
        ("model_name=qwen3-1.7", "did you mean qwen3-1.7b?"),
        ("model_name=gpt3-175b", "`maxconv families`"),
        ("fused_mlp=true", "not supported"),
        ("ici_pipeline_parallelism=2", "not supported"),
        ("eager_load_method=pytorch", "is not one of safetensors, transformers"),
        ("save_dtype=float16", "not one of bfloat16, float32, float8_e4m3fn"),
        ("--save_dtype=half", "not one of bfloat16, float32"),
        ("--verify=some", "none, sample, full"),
        ("hardware=gpu", "not supported"),
        ("ici_fsdp_parallelism=0", "neither positive nor -1"),
        ("simulated_cpu_devices_count=0", "less than 1"),
        ("base_emb_dim=0", "less than 1"),
        ("max_host_memory_gb=-1", "not positive"),
        ("mesh_axes=[a,a]", "different names"),
        ("mesh_axes=fsdp", "a YAML list"),
        ("logical_axis_rules=[[a]]", "[name, [mesh axes]]"),
        ("--num_processes=2", "--coordinator_address and --process_id missing"),
        ("--coordinator_address=a:1 --num_processes=2 --process_id=2", "not below"),
    ],
)
def test_a_problem_says_what_to_mend(line: str, words: str) -> None:
    assert words in problem(line)


def test_yml(tmp_path: Path) -> None:
    (tmp_path / "base.yml").write_text(
        "scan_layers: false\nparam_scan_axis: 2\nsteps: 5\nmodel_name: default\n"
        'hf_access_token: ""\nlogical_axis_rules: [[embed, fsdp], [mlp, [tensor]], [norm, []]]\n'
    )
    (tmp_path / "mine.yml").write_text(
        "base_config: base.yml\nmodel_name: mistral-7b\nparam_scan_axis: 0\nnews: 1\n"
    )
    config = read(f"{tmp_path}/mine.yml logical_axis_rules=[[embed,[data,fsdp]]]")
    assert (config.model_name, config.scan_layers, config.param_scan_axis) == (
        "mistral-7b",
        False,
        0,
    )
    rules = (("mlp", ("tensor",)), ("norm", ()), ("embed", ("data", "fsdp")))
    assert config.logical_axis_rules == rules
    assert "does not have, ignored: news" in config.notices[0]
    assert read(f"{tmp_path}/mine.yml scan_layers=true", M_PARAM_SCAN_AXIS="3").param_scan_axis == 3
    alone = "override_logical_axis_rules=true logical_axis_rules=[[a,b]]"
    assert read(f"{tmp_path}/mine.yml {alone}").logical_axis_rules == (("a", ("b",)),)


def test_bad_yml(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    for text, words in [
        ("a: [", "cannot be read as YAML"),
        ("- a", "not a mapping"),
        ("scan_layers: 3", f"scan_layers=3 in {path} is not true or false"),
        ("base_config: other.yml", "no such file"),
    ]:
        path.write_text(text)
        assert words in problem(str(path))


def test_model_facts() -> None:
    assert model_facts(None) is None
    facts = model_facts("qwen3-1.7b-base")
    assert facts and facts["hf_id"] == "Qwen/Qwen3-1.7B-Base" and facts["base_emb_dim"] == 2048
    for name in known_models():
        facts = model_facts(name)
        assert facts
        others = {"scan_layers", "train_as", "logical_axis_rules"}
        assert facts.keys() - others == {"hf_id", "architecture", *MODEL_KEYS}
        assert facts["base_num_query_heads"] % facts["base_num_kv_heads"] == 0
    mistral = model_facts("mistral-7b")
    assert mistral and (mistral["decoder_block"], mistral["vocab_size"]) == ("mistral", 32000)


def test_tables() -> None:
    assert defaults().keys() <= maxtext_keys()
    keys = config_path("maxtext_keys.txt").read_text().split("\n")
    assert keys == sorted(keys[:-1]) + [""]
    assert len(read().logical_axis_rules) == 80


def test_yaml_1_1_numbers_and_copies() -> None:
    assert convert(float, "1e-06") == 1e-06 and convert(float, 2) == 2.0
    config = read("model_name=llama3.1-70b-Instruct hf_access_token=x")
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_model_may_say_that_its_layers_are_not_scanned() -> None:
    words = ["model_name=qwen3-vl-30b-a3b"]
    assert parse(words, {}).scan_layers is False
    assert parse([*words, "scan_layers=true"], {}).scan_layers is True
    assert parse(["model_name=qwen3-30b-a3b"], {}).scan_layers is True


def test_paths_are_read_in_one_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in (
        *("--hf_model_path", "hf_lora_adapter_path", "load_parameters_path"),
        *("base_output_directory", "--trace", "--report"),
    ):
        found = read(f"{key}=~/m/")
        assert getattr(found, key.lstrip("-")) == str(Path.home() / "m")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    for page, name in {
        "https://huggingface.co/o/n": "hf://o/n",
        "https://hf.co/o/n/?a=b#c": "hf://o/n",
        "https://mirror.example/o/n/": "hf://o/n",
        "hf://o/n/": "hf://o/n",
        "https://huggingface.co/o/n/tree/v1": "hf://o/n@v1",
        "https://huggingface.co/o/n/tree/refs%2Fpr%2F3/": "hf://o/n@refs/pr/3",
        "https://huggingface.co/o/n/blob/main/config.json": "hf://o/n@main",
        "https://huggingface.co/o/n/resolve/main/a/b.safetensors": "hf://o/n@main",
        "o/n/": "o/n",
        "file:///a/b/": "/a/b",
        "gs://b/c//": "gs://b/c",
        "/": "/",
    }.items():
        assert read(f"--hf_model_path={page}").hf_model_path == name
    for text, said in {
        "gs:/b/c": "gs:/b/c is no path: write gs://b/c",
        "hf:/o/n": "write hf://o/n",
        "https://elsewhere.example/o/n": "no page of a model on the Hub",
        "https://huggingface.co/datasets/o/n": "no page of a model on the Hub",
        "https://huggingface.co/o/n/tree/main/sub": "is a directory within a model",
    }.items():
        for key in ("base_output_directory", "--hf_model_path", "hf_lora_adapter_path"):
            with pytest.raises(UserError, match=said):
                read(f"{key}={text}")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yml").write_text("base_config: ~/base.yml\nscan_layers: false")
    (tmp_path / "base.yml").write_text("param_scan_axis: 2")
    found = read("~/mine.yml")
    assert (found.scan_layers, found.param_scan_axis) == (False, 2)


def test_paths_of_other_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "flags").write_text("gs:/b\n")
    for command in ("inspect", "verify", "demo"):
        assert cli.main([command, "--flagfile=~/flags"]) == 2
        assert "=gs:/b is no path: write gs://b" in capsys.readouterr().err
    for command in ("inspect", "verify"):
        assert cli.main([command, "~/file/"]) == 2
        assert str(tmp_path / "file") in capsys.readouterr().err
