"""What was exported loads in transformers as the original does, and has its logits.

Runs where torch and transformers are installed: `pip install '.[transformers]'`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / part) for part in (".", "maxtext")]

import tiny  # noqa: E402
import told  # noqa: E402  # pyright: ignore[reportMissingImports]
from jobs import CPU, MESHES  # noqa: E402
from test_export import export  # noqa: E402

from maxconv.config import parse  # noqa: E402
from maxconv.jobs import convert  # noqa: E402

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Kernels take sizes that are multiples of 16 bytes, which those of tiny models are not.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
transformers.logging.set_verbosity_error()


def architecture(case: str) -> str:
    return tiny.CASES[case].config["architectures"][0]


# One of each architecture that transformers has.
CASES = {
    architecture(case): pytest.param(case, scan, id=f"{case}-{'scan' if scan else 'unscan'}")
    for case, scan in reversed(tiny.LAYERS)
    if hasattr(transformers, architecture(case))
    and "quantization_config" not in tiny.CASES[case].config
}


@pytest.mark.parametrize(("case", "scan"), [*CASES.values()])
def test_transformers_loads_it_as_the_original(case: str, scan: bool, tmp_path: Path) -> None:
    model = told.write(case, tmp_path / "hf", "float32")
    try:
        want, wanted = loaded(case, model)
    except Exception as error:  # of published models transformers takes what these leave out
        pytest.skip(f"transformers cannot run this tiny model: {error}")
    given = [*tiny.maxtext_words(case, scan), *CPU, *MESHES["fsdp4_tp2"], "--verify=none"]
    given += [f"--hf_model_path={model}", f"base_output_directory={tmp_path / 'out'}"]
    convert.run(parse([*given, "--save_dtype=float32"]))
    assert export(tmp_path / "out", model, tmp_path / "back") == 0
    got, found = loaded(case, tmp_path / "back")
    assert found == wanted
    assert got.shape == want.shape and np.isfinite(want).all()
    np.testing.assert_allclose(got, want, atol=1e-5 * abs(want).max())


def loaded(case: str, directory: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The logits of some tokens, and what transformers says of the names of tensors."""
    model, found = getattr(transformers, architecture(case)).from_pretrained(
        directory, dtype="float32", output_loading_info=True, **EAGER
    )
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, 250, (2, 11)))
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits
    names = {key: sorted(map(str, names)) for key, names in found.items() if names}
    print(case, json.dumps(names)[:300])
    return logits.float().numpy(), names
