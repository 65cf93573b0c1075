"""What a conversion was told of the order of queries and keys outlives a new layout."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from maxconv.config import parse
from maxconv.jobs import convert, export, prepare_export, prepare_relayout
from maxconv.jobs.reporter import Reporter

ON_CPU = ("hardware=cpu", "ici_fsdp_parallelism=8", "skip_jax_distributed_system=true")


@pytest.mark.slow
def test_an_export_of_a_new_layout_has_the_published_order(tmp_path: Path) -> None:
    """Llama 2 by name has its halves in transformers' order; nothing after that names it."""
    model = tiny.write("llama2-7b", tmp_path / "hf", dtype="float32")
    words = (*ON_CPU, "--save_dtype=float32")
    named = [*tiny.maxtext_words("llama2-7b", True), f"--hf_model_path={model}"]
    convert.run(parse([*named, f"base_output_directory={tmp_path / 'out'}", *words]))
    preparing = partial(prepare_relayout.prepared, checkpoint=str(tmp_path / "out"))
    apart = [f"base_output_directory={tmp_path / 'apart'}", "scan_layers=false", *ON_CPU]
    convert.run(parse(apart), None, preparing)
    back = parse([f"base_output_directory={tmp_path / 'back'}", *words])
    with prepare_export.prepared(back, str(tmp_path / "apart")) as job:
        export.run(job, Reporter())
    for file in model.glob("*.safetensors"):
        after = {
            n: x for f in (tmp_path / "back").glob("*.safetensors") for n, x in load_file(f).items()
        }
        for name, tensor in load_file(file).items():
            np.testing.assert_allclose(after[name], tensor, rtol=1e-6, err_msg=name)
