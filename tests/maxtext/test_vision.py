"""The vision encoder of a tiny Llama 4 through maxconv, then MaxText: transformers' features.

Of the other encoders MaxText's own converter is the oracle, which does not know this model. The
reference is stored by `reference_tiny.py`. Runs in the environment that `environment.sh` makes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import told  # noqa: E402
from test_smollm2 import run  # noqa: E402
from test_tiny_logits import DENSE_EXPERTS, HALVES, converted  # noqa: E402

NAME = "llama4-17b-128e+vision"
FEATURES = """
import sys
import load_logits, maxtext, jax, numpy as np
from pathlib import Path
from flax import nnx
from flax.linen import partitioning
from maxtext.configs import pyconfig

items, stored, out, *words = sys.argv[1:]
base = Path(next(iter(maxtext.__path__)), "configs", "base.yml")
words += ["dtype_mm=float32", f"load_parameters_path={items}", f"base_output_directory={out}.d"]
config = pyconfig.initialize(["x", str(base), *load_logits.RUN_WORDS, *words])
model, mesh = load_logits.load(config, "pretrain")
see = nnx.jit(lambda model, pixels: model.vision_encoder(input_images=pixels)[0])
with jax.set_mesh(mesh), partitioning.axis_rules(config.logical_axis_rules):
    np.save(out, np.asarray(see(model, np.load(stored)["pixels"][:, None])))
"""


def test_maxtext_sees_what_transformers_sees(tmp_path: Path) -> None:
    stored = HERE.parent / "data" / "logits" / f"{NAME}.npz"
    want = np.load(stored)["features"]
    checkpoint = told.write(NAME, tmp_path / "hf", "float32")
    command = converted(checkpoint, tmp_path / "out", True, "use_multimodal=True")
    words = [word for word in command if not word.startswith("load_parameters_path=")]
    out = tmp_path / "features.npy"
    run(
        *("-c", FEATURES, tmp_path / "out/0/items", stored, out, *words),
        *("max_target_length=24", *HALVES, *DENSE_EXPERTS),
        env={"PYTHONPATH": str(HERE)},
    )
    got = np.load(out).reshape(want.shape)
    assert abs(got - want).max() <= 1e-5 * abs(want).max()
