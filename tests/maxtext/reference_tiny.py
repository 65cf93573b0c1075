"""What tiny checkpoints say in transformers, as a reference for MaxText.

    python reference_tiny.py CASE ...

stores in `tests/data/logits/CASE.npz` some tokens and the logits after each, computed in float32.
Needs torch and transformers beside the test requirements; whoever reads the files needs numpy.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

TESTS = Path(__file__).resolve().parents[1]
STORED = TESTS / "data" / "logits"
sys.path.insert(0, str(TESTS))

import tiny  # noqa: E402

LENGTH = 24


def main() -> None:
    STORED.mkdir(exist_ok=True)
    for case in sys.argv[1:]:
        (architecture,) = tiny.CASES[case].config["architectures"]
        with tempfile.TemporaryDirectory() as directory:
            model = getattr(transformers, architecture).from_pretrained(
                tiny.write(case, directory, "float32"),
                dtype=torch.float32,
                attn_implementation="eager",
            )
        vocab = model.get_input_embeddings().weight.shape[0]
        tokens = (np.arange(1, LENGTH + 1) ** 2 % vocab).astype(np.int32)[None]
        with torch.inference_mode():
            logits = model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()
        np.savez_compressed(STORED / f"{case}.npz", tokens=tokens, logits=logits)
        print(f"{case}: logits of {logits.shape}, up to {abs(logits).max():.2f}")


if __name__ == "__main__":
    main()
