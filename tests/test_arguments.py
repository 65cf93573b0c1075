"""Arguments that are hostile, or were recorded by someone else; files that are not ours."""

import json
import time
from pathlib import Path

import pytest

from maxconv.config import parse, recorded
from maxconv.config.argv import load_yaml
from maxconv.config.outputs import MARK, output_problem
from maxconv.errors import UserError

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "[" * 100_000,
        "[" * 50 + "]" * 50,
        "a: " + "1" * 5000,
        "a: " + ":".join(["1"] * 50_000),
        "a: 2020-99-99",
        "x" * 2_000_000,
        "a: !!python/object:os.system x",
        "a: \x00",
        "a: &x [*x]",
    ],
    ids=lambda text: text[:20],
)
def test_yaml_ends(text: str, tmp_path: Path) -> None:
    before = time.monotonic()
    (tmp_path / "mine.yml").write_text(text)
    for argv in ([str(tmp_path / "mine.yml")], [f"logical_axis_rules={text}"]):
        with pytest.raises(UserError) as error:
            parse(argv, {})
        assert len(error.value.problems) == 1
    assert time.monotonic() - before < 20


def test_yaml_of_a_usual_kind() -> None:
    assert load_yaml("[[embed, [data, fsdp]], [norm, null]]")[1] == ["norm", None]


def test_configs_that_read_one_another(tmp_path: Path) -> None:
    (tmp_path / "a.yml").write_text("base_config: b.yml")
    (tmp_path / "b.yml").write_text("base_config: a.yml")
    with pytest.raises(UserError, match="is the last of 16 files that read one another"):
        parse([str(tmp_path / "a.yml")], {})


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("vocab_size=1000000000000000", "vocab_size=1000000000000000 is more than 2147483647"),
        ("base_num_decoder_layers=1000000000", "is more than 4096"),
        ("num_experts=1000000000", "is more than 65536"),
        ("--num_slices=100000", "is more than 1024"),
        ("--simulated_cpu_devices_count=100000", "is more than 1024"),
        ("--max_retries=1000000", "is more than 1000"),
        ("--max_host_memory_gb=inf", "is not a number"),
        ("--max_host_memory_gb=nan", "is not a number"),
        ("--max_host_memory_gb=1e300", "is more than"),
        ("param_scan_axis=" + "9" * 5000, "is not a whole number"),
        ("ici_fsdp_parallelism=99999999999", "is more than 2147483647"),
        ("jax_distributed_initialization_timeout=99999999999", "is more than 604800"),
        ("base_output_directory=a\0b", "is not a string"),
    ],
)
def test_values_without_measure(argument: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        parse([argument, "override_model_config=true"], {})


def test_a_mesh_of_too_many_simulated_devices() -> None:
    config = parse(["hardware=cpu", "ici_fsdp_parallelism=100000"], {})
    assert config.simulated_cpu_devices_count == 1024  # and the mesh does not fit them


SHAPING = ["model_name=qwen3-0.6b", "scan_layers=False", "hf_model_path=org/name", "vocab_size=9"]


def test_what_was_recorded_is_taken_if_it_shapes_a_checkpoint() -> None:
    theirs = [
        *SHAPING,
        "coordinator_address=10.0.0.1:1234",
        "--coordinator_address=10.0.0.1:1234",
        "--coordinator_address",
        "num_processes=2",
        "process_id=1",
        "hf_access_token=x",
        "base_output_directory=/elsewhere",
        "report=/etc/passwd",
        "trace=/etc/passwd",
        "overwrite=true",
        "jax_distributed_initialization_timeout=99999999",
        "max_host_memory_gb=9999",
        "/elsewhere/their.yml",
        "tpu_type=v5p-8",
        "unheard_of=1",
        "steps=5",
    ]
    assert recorded(theirs) == SHAPING
    assert recorded([]) == []


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (None, "not a list of strings"),
        ({"a": 1}, "not a list of strings"),
        (["scan_layers=true", 5], "not a list of strings"),
        (["scan_layers=true"] * 100_000, "not a list of strings"),
        (["scan_layers=perhaps"], "checkpoint: scan_layers=perhaps is not true or false"),
        (["vocab_size=many"], "vocab_size=many is not a whole number"),
        ([f"mesh_axes={BOMB}"], "is not a YAML list"),
        (["hf_model_path=a\0b"], "is not a string"),
    ],
)
def test_what_was_recorded_has_types(theirs: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recorded(theirs)


def test_what_is_recorded_says_the_same_without_its_yml(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text(
        "scan_layers: false\nparam_scan_axis: 0\nhf_access_token: secret\n"
        "base_output_directory: elsewhere\nvocab_size: 77\nici_tensor_parallelism: 2\n"
        "logical_axis_rules: [[embed, fsdp], [mlp, [tensor]], [norm, null]]\n"
    )
    argv = [str(tmp_path / "mine.yml"), "logical_axis_rules=[[mlp,[data]]]", "--save_dtype=float32"]
    argv += ["--coordinator_address=a:1", "--num_processes=1", "--process_id=0", "base_emb_dim=64"]
    config = parse(argv, {})
    (tmp_path / "mine.yml").unlink()
    again = parse(recorded(json.loads(json.dumps(config.words))), {})
    for name in (
        "scan_layers",
        "param_scan_axis",
        "logical_axis_rules",
        "save_dtype",
        "overrides",
        "parallelism",
        "mesh_axes",
        "words",
    ):
        assert getattr(again, name) == getattr(config, name), name
    assert "secret" not in str(config.words) and "yml" not in str(config.words)


def test_files_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "plan.html"
    assert output_problem("--report", str(file)) is None
    file.write_text(f'<meta name="generator" content="{MARK}">')
    assert output_problem("--report", str(file)) is None
    for content in ("thesis", "", "x" * 5000 + MARK):
        file.write_text(content)
        problem = output_problem("--report", str(file))
        assert problem == (
            f"--report={file} already exists and was not written by maxconv; name another file, or "
            "remove it first."
        )
    file.unlink()
    file.symlink_to(tmp_path / "nothing")
    assert "already exists" in (output_problem("--trace", str(file)) or "")
    assert "already exists" in (output_problem("--trace", str(tmp_path)) or "")
    assert "already exists" in (output_problem("--trace", "/dev/null") or "")
    assert "there is no directory" in (output_problem("--trace", f"{tmp_path}/a/b.json") or "")
    assert "/proc" in (output_problem("--trace", "/proc/trace.json") or "")
