"""Published models at their full size, without their bytes: config.json and tensor headers.

Everything that happens before a conversion reads can be tested on them: what a checkpoint is, its
plan, what its cells compile to.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from maxconv.sources import Source, TensorInfo
from maxconv.sources.safetensors import DTYPES
from maxconv.tables import model_facts

# MaxText's decoder block, transformers' architecture.
ARCHITECTURES = {
    "llama2": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

# Entry of config.json, MaxText's key.
_CONFIG = {
    "hidden_size": "base_emb_dim",
    "intermediate_size": "base_mlp_dim",
    "num_attention_heads": "base_num_query_heads",
    "num_key_value_heads": "base_num_kv_heads",
    "head_dim": "head_dim",
    "num_hidden_layers": "base_num_decoder_layers",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "logits_via_embedding",
}


class HeaderSource(Source):
    """The headers of a checkpoint; to read its tensors is an error."""

    def __init__(self, root: str, config: Mapping[str, Any], tensors: Sequence[TensorInfo]):
        super().__init__()
        self.root, self.revision, self.notices = root, None, ()
        self.config = dict(config)
        self.tensors = {info.name: info for info in tensors}

    def _fetch(
        self, info: TensorInfo, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        raise OSError(f"{self.root} is headers only: there is no {info.name} to read")

    def close(self) -> None:
        pass


def published(model_name: str, dtype: str = "BF16", **config: Any) -> HeaderSource:
    """A model by MaxText's name, as Hugging Face publishes it.

    Args:
        model_name: a row of `configs/models.yml`.
        dtype: of its tensors, as safetensors names it.
        config: entries of config.json to have otherwise, such as num_hidden_layers=2.
    """
    facts = model_facts(model_name)
    assert facts is not None
    said = {entry: facts[key] for entry, key in _CONFIG.items()} | config
    said |= {"architectures": [ARCHITECTURES[facts["decoder_block"]]], "torch_dtype": "bfloat16"}
    infos: list[TensorInfo] = []
    offset = 0
    for name, shape in shapes(said, facts["attention_bias"], facts["use_qk_norm"]).items():
        infos.append(TensorInfo(name, DTYPES[dtype], shape, "model.safetensors", offset))
        offset += infos[-1].nbytes
    return HeaderSource(facts["hf_id"], said, infos)


def shapes(
    config: Mapping[str, Any], qkv_bias: bool = False, qk_norm: bool = False
) -> dict[str, tuple[int, ...]]:
    """The tensors of a dense decoder, as transformers' modeling files have them."""
    emb, mlp, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    head_dim = config["head_dim"]
    heads = {part: config["num_key_value_heads"] for part in "kv"}
    heads["q"] = config["num_attention_heads"]
    norms = ("input_layernorm", "post_attention_layernorm")
    layer: dict[str, tuple[int, ...]] = {f"{norm}.weight": (emb,) for norm in norms}
    for part, n in heads.items():
        layer[f"self_attn.{part}_proj.weight"] = (n * head_dim, emb)
        if qkv_bias:
            layer[f"self_attn.{part}_proj.bias"] = (n * head_dim,)
        if qk_norm and part != "v":
            layer[f"self_attn.{part}_norm.weight"] = (head_dim,)
    layer["self_attn.o_proj.weight"] = (emb, heads["q"] * head_dim)
    layer |= {f"mlp.{part}_proj.weight": (mlp, emb) for part in ("gate", "up")}
    layer["mlp.down_proj.weight"] = (emb, mlp)

    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, emb)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (emb,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, emb)
    return found
