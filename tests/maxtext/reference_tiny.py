"""What tiny checkpoints say in transformers, as a reference for MaxText.

    python reference_tiny.py [--dtype bfloat16] CASE ...

stores in `tests/data/logits/CASE.npz` some tokens and the logits after each, computed in float32,
and the dtype of the checkpoint. Where the head is the embedding table, `rounded` has the logits
with that rounded as MaxText does. Where Llama 4 sees, `features` are of the images `pixels`.
Needs torch and transformers beside the test requirements; whoever reads the files needs numpy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TESTS = Path(__file__).resolve().parents[1]
STORED = TESTS / "data" / "logits"
sys.path[:0] = [str(TESTS), str(TESTS / "maxtext")]

import tiny  # noqa: E402
import told  # noqa: E402

LENGTH = 24


def load(case: str, dtype: str) -> Any:
    """The model of a case's checkpoint, which transformers dequantises if need be."""
    (architecture,) = tiny.CASES[case.partition(",")[0]].config["architectures"]
    with tempfile.TemporaryDirectory() as directory:
        told.write(case, directory, dtype)
        model = getattr(transformers, architecture).from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            experts_implementation="eager",
        )
    return model


def round_head(model: Any) -> None:
    """Rounds the head, not the embedding, to bfloat16 after the embedding's scale (Gemma's)."""
    table = model.get_input_embeddings().weight
    scale = table.shape[1] ** 0.5
    rounded = (table * scale).bfloat16().float() / scale
    model.get_output_embeddings().weight = torch.nn.Parameter(rounded)


def main() -> None:
    parser = argparse.ArgumentParser(description="Stores what transformers says.")
    parser.add_argument("case", nargs="+", choices=(*tiny.CASES, *told.SAID), metavar="CASE")
    parser.add_argument("--dtype", choices=tiny.DTYPES, default="float32")
    args = parser.parse_args()
    STORED.mkdir(exist_ok=True)
    for case in args.case:
        model = load(case, args.dtype)
        vocab = model.get_input_embeddings().weight.shape[0]
        tokens = (np.arange(1, LENGTH + 1) ** 2 % vocab).astype(np.int32)[None]
        found = {}
        if isinstance(model, transformers.Llama4ForConditionalGeneration):
            found |= features(model)
            model = model.language_model  # the whole fails in transformers 5.24 without an image
        found["logits"] = logits(model, tokens)
        if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
            round_head(model)
            found["rounded"] = logits(model, tokens)
        np.savez_compressed(STORED / f"{case}.npz", tokens=tokens, dtype=args.dtype, **found)
        print(f"{case}: logits of {found['logits'].shape}, up to {abs(found['logits']).max():.2f}")


def features(model: Any) -> dict[str, np.ndarray]:
    """Two images, and the tokens that the decoder gets of them."""
    side = model.config.vision_config.image_size
    pixels = np.random.default_rng(0).standard_normal((2, 3, side, side), np.float32)
    with torch.inference_mode():
        seen = model.vision_model(torch.from_numpy(pixels)).last_hidden_state
        tokens = model.multi_modal_projector(seen)
    return {"pixels": pixels, "features": tokens.numpy()}


def logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return model(torch.tensor(tokens, dtype=torch.int64)).logits.numpy()


if __name__ == "__main__":
    main()
