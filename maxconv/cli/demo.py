"""`maxconv demo`: makes, converts and verifies a small checkpoint on simulated devices."""

import json
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from maxconv.text import say, size

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 16000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
SHARD_BYTES = 16 << 20


def run(directory: str) -> None:
    """Makes a checkpoint in `directory`, converts it on 8 devices and verifies every bit."""
    from maxconv.cli.commands import start
    from maxconv.cli.reports import TerminalReporter
    from maxconv.jobs import convert

    began = time.monotonic()
    source, target = Path(directory, "hf"), Path(directory, "maxtext")
    nbytes = write_checkpoint(source)
    say(
        f"Made a small Llama in {source}: {size(nbytes)} of random bfloat16 weights in "
        f"{len(list(source.glob('*.safetensors')))} files.\n"
        "Converting it for training on a mesh of fsdp=4 x tensor=2, 8 simulated CPU devices:"
    )
    arguments = [
        f"base_output_directory={target}",
        f"--hf_model_path={source}",
        "ici_fsdp_parallelism=4",
        "ici_tensor_parallelism=2",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
        "--verify=full",
        "--overwrite",
    ]
    config = start(arguments)
    job = convert.run(config, TerminalReporter())
    kernel = next(leaf for leaf in job.plan.leaves if "wi_0" in leaf.name)
    say(
        f"\nDone in {time.monotonic() - began:.0f} s. The {job.model.dims.layers} layers are "
        f"stacked as MaxText scans them; {kernel.name} is {kernel.shape}, sharded "
        f"{kernel.sharding.spec},\nso that each device has {size(kernel.shard_nbytes)} of its "
        f"{size(kernel.nbytes)}. To look at the checkpoint, run\n"
        f"    maxconv inspect {target}\n"
        "To convert your own model, run\n"
        "    maxconv convert --hf_model_path=DIR base_output_directory=OUT"
    )


def write_checkpoint(directory: Path) -> int:
    """A Llama of random weights, as the Hub has them: several files and an index. Returns bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2))
    random = np.random.default_rng(0)
    shards: list[dict[str, np.ndarray]] = [{}]
    for name, shape in tensor_shapes().items():
        array = random.standard_normal(shape, np.float32) / np.sqrt(shape[-1])
        held = sum(a.nbytes for a in shards[-1].values())
        if held and held + array.nbytes // 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = array.astype(ml_dtypes.bfloat16)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(a.nbytes for shard in shards for a in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of CONFIG, as transformers names them."""
    emb, mlp, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    heads = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    kv_heads = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    layer = {
        "input_layernorm": (emb,),
        "self_attn.q_proj": (heads, emb),
        "self_attn.k_proj": (kv_heads, emb),
        "self_attn.v_proj": (kv_heads, emb),
        "self_attn.o_proj": (emb, heads),
        "post_attention_layernorm": (emb,),
        "mlp.gate_proj": (mlp, emb),
        "mlp.up_proj": (mlp, emb),
        "mlp.down_proj": (emb, mlp),
    }
    return {
        "model.embed_tokens.weight": (vocab, emb),
        **{
            f"model.layers.{i}.{name}.weight": shape
            for i in range(CONFIG["num_hidden_layers"])
            for name, shape in layer.items()
        },
        "model.norm.weight": (emb,),
        "lm_head.weight": (vocab, emb),
    }
