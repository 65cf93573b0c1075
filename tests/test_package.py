"""The wheel has all that it needs, and nothing else."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECK = """
import pathlib, maxconv
from maxconv.config import model_facts, parse
config = parse(["model_name=qwen3-0.6b"], {})
assert dict(config.logical_axis_rules)["vocab"][0] == "tensor"
assert model_facts("qwen3-0.6b")["base_emb_dim"] == 1024
print(pathlib.Path(maxconv.__file__).parent)
"""


def test_configs_are_in_the_wheel_and_found_there(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"maxconv/py.typed", "maxconv/configs/base.yml", "maxconv/configs/models.yml"} < {*names}
    assert all(n.startswith("maxconv") for n in names) and any("LICENSE" in n for n in names)

    venv.create(tmp_path / "clean")
    python = tmp_path / "clean/bin/python"
    # Words are read without JAX: of the dependencies, these are enough to see that data is found.
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps"]
    install += [str(wheel), "pyyaml", "numpy"]
    subprocess.run(install, check=True, timeout=300)
    found = subprocess.run(
        [python, "-I", "-c", CHECK],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "clean")
    assert (tmp_path / "clean/bin/maxconv").exists()
