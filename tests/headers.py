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
    "gemma2": "Gemma2ForCausalLM",
    "llama2": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}

# Entry of config.json, MaxText's key: of all architectures, and of some.
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
_CONFIG_OF = {
    "mixtral": {"num_local_experts": "num_experts"},
    "qwen3_moe": {"num_experts": "num_experts", "moe_intermediate_size": "base_moe_mlp_dim"},
}

# What config.json has that MaxText has otherwise: an intermediate_size that no layer uses.
_DENSE_MLP = {
    "qwen3-30b-a3b": 6144,
    "qwen3-30b-a3b-base": 6144,
    "qwen3-235b-a22b": 12288,
    "qwen3-480b-a35b": 8192,
    "qwen3-coder-480b-a35b": 8192,
}


def _norms(*names: str) -> dict[str, str]:
    return {f"{name}.weight": "emb" for name in names}


def _attention(bias: bool = False, norms: Mapping[str, str] | None = None) -> dict[str, str]:
    """Grouped-query attention; `norms`: the axis of those of queries and keys."""
    found = {}
    for part, heads in (("k", "kv"), ("v", "kv"), ("q", "q")):
        found[f"self_attn.{part}_proj.weight"] = f"{heads} emb"
        if bias:
            found[f"self_attn.{part}_proj.bias"] = heads
        if norms and part in norms:
            found[f"self_attn.{part}_norm.weight"] = norms[part]
    return found | {"self_attn.o_proj.weight": "emb q"}


def _gated(path: str, gate: str, up: str, down: str, mlp: str) -> dict[str, str]:
    inwards = {f"{path}.{name}.weight": f"{mlp} emb" for name in (gate, up)}
    return inwards | {f"{path}.{down}.weight": f"emb {mlp}"}


_PROJ = ("gate_proj", "up_proj", "down_proj")
_MLP = _gated("mlp", *_PROJ, "mlp")
_PRE_NORMS = _norms("input_layernorm", "post_attention_layernorm")
_POST_NORMS = _norms("post_attention_layernorm", "post_feedforward_layernorm")
_EACH_HEAD = {"q": "head", "k": "head"}
_ALL_HEADS = {"q": "q", "k": "kv"}

# Names and axes of a layer's tensors, as transformers' checkpoints have them; {e}: of each expert.
_LAYERS = {
    "Gemma2ForCausalLM": (
        _norms("input_layernorm", "pre_feedforward_layernorm") | _POST_NORMS | _attention() | _MLP
    ),
    "LlamaForCausalLM": _PRE_NORMS | _attention() | _MLP,
    "MistralForCausalLM": _PRE_NORMS | _attention() | _MLP,
    "MixtralForCausalLM": (
        _PRE_NORMS
        | _attention()
        | {"block_sparse_moe.gate.weight": "experts emb"}
        | _gated("block_sparse_moe.experts.{e}", "w1", "w3", "w2", "mlp")
    ),
    "Olmo3ForCausalLM": _POST_NORMS | _attention(norms=_ALL_HEADS) | _MLP,
    "Qwen2ForCausalLM": _PRE_NORMS | _attention(bias=True) | _MLP,
    "Qwen3ForCausalLM": _PRE_NORMS | _attention(norms=_EACH_HEAD) | _MLP,
    "Qwen3MoeForCausalLM": (
        _PRE_NORMS
        | _attention(norms=_EACH_HEAD)
        | {"mlp.gate.weight": "experts emb"}
        | _gated("mlp.experts.{e}", *_PROJ, "moe_mlp")
    ),
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
    block = facts["decoder_block"]
    entries = _CONFIG | _CONFIG_OF.get(block, {})
    said = {entry: facts[key] for entry, key in entries.items()}
    if block == "gemma2":  # MaxText counts pairs of layers and pads the vocabulary
        said |= {"num_hidden_layers": 2 * said["num_hidden_layers"], "vocab_size": 256000}
    if block == "qwen3_moe":
        said["intermediate_size"] = _DENSE_MLP[model_name]
    said |= config
    said |= {"architectures": [ARCHITECTURES[block]], "torch_dtype": "bfloat16"}
    infos: list[TensorInfo] = []
    offset = 0
    for name, shape in shapes(said).items():
        infos.append(TensorInfo(name, DTYPES[dtype], shape, "model.safetensors", offset))
        offset += infos[-1].nbytes
    return HeaderSource(facts["hf_id"], said, infos)


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a decoder, by its config.json."""
    emb, vocab, head = (config[k] for k in ("hidden_size", "vocab_size", "head_dim"))
    experts = config.get("num_experts") or config.get("num_local_experts", 0)
    sizes = {
        "emb": emb,
        "mlp": config["intermediate_size"],
        "moe_mlp": config.get("moe_intermediate_size"),
        "experts": experts,
        "head": head,
        "q": config["num_attention_heads"] * head,
        "kv": config["num_key_value_heads"] * head,
    }
    (architecture,) = config["architectures"]
    layer: dict[str, tuple[int, ...]] = {}
    for name, axes in _LAYERS[architecture].items():
        shape = tuple(sizes[axis] for axis in axes.split())
        numbers = range(experts) if "{e}" in name else (0,)
        layer |= {name.format(e=e): shape for e in numbers}

    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, emb)}
    for i in range(config["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (emb,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, emb)
    return found
