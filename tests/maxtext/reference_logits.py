"""What SmolLM2 says in transformers, as a reference for MaxText.

    python reference_logits.py [--full FILE]

stores in `tests/data/smollm2_reference.npz` some prompts, each followed by its greedy continuation,
and a sample of the logits at every position; with `--full` it writes all logits to another file,
too large to be kept. Computed in float64 and stored in float32: the model has activations in the
thousands, and programs that compute it in float32 are about 1e-4 off. Needs torch and transformers
beside the test requirements; whoever reads the stored file needs numpy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TESTS = Path(__file__).resolve().parents[1]
STORED = TESTS / "data" / "smollm2_reference.npz"
sys.path.insert(0, str(TESTS))

import smollm2  # noqa: E402

PROMPTS = (
    "The capital of France is",
    "Water boils at one hundred degrees Celsius at sea level, but high up in the mountains it",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "<|im_start|>user\nName three planets of the solar system.<|im_end|>\n<|im_start|>assistant\n",
)
STEPS = 24
LENGTH = 64  # of the padded sequences, so that a program compiled for one shape does them all
COLUMN_STRIDE = 257
# A program whose logits are half of this off still chooses the same tokens.
CLEAR_LEAD = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description="Computes reference logits with transformers.")
    parser.add_argument("--full", type=Path, help="file for the logits of all tokens, 50 MB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = smollm2.write(Path(directory))
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float64, attn_implementation="eager"
        )
    gguf = smollm2.gguf_path()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    tokens = np.zeros((len(PROMPTS), LENGTH), np.int32)
    prompt_lengths = np.zeros(len(PROMPTS), np.int32)
    logits = np.zeros((*tokens.shape, smollm2.CONFIG["vocab_size"]), np.float32)
    for row, prompt in enumerate(PROMPTS):
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start, end = len(ids), len(ids) + STEPS
        prompt_lengths[row] = start
        with torch.inference_mode():
            new, cache = ids, None
            for _ in range(STEPS):
                output = model(torch.tensor([new]), past_key_values=cache, use_cache=True)
                new, cache = [int(output.logits[0, -1].argmax())], output.past_key_values
                ids = ids + new
            tokens[row, :end] = ids
            logits[row, :end] = model(torch.tensor([ids])).logits[0].numpy()
        second, best = np.partition(logits[row, start - 1 : end - 1], -2)[:, -2:].T
        print(f"{tokenizer.decode(ids)!r}, ahead by {(best - second).min():.3f} or more")
        assert (best - second).min() > CLEAR_LEAD, "choose another prompt: this one has a near tie"

    highest = logits.max(axis=-1)
    np.savez_compressed(
        STORED,
        tokens=tokens,
        prompt_lengths=prompt_lengths,
        steps=STEPS,
        column_stride=COLUMN_STRIDE,
        logits=logits[..., ::COLUMN_STRIDE],
        # One number on which all columns have an influence.
        logsumexp=highest + np.log(np.exp(logits - highest[..., None]).sum(axis=-1)),
    )
    if args.full:
        np.savez(args.full, logits=logits)


if __name__ == "__main__":
    main()
