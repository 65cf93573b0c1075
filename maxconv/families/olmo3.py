"""OLMo 3. transformers modeling_olmo3.py; MaxText models/olmo3.py."""

from maxconv.families.blocks import attention, ends, gated_mlp, norm
from maxconv.families.dims import Dims
from maxconv.families.rope import FULL
from maxconv.families.settings import Computation, activation, epsilon, layer_kinds, window
from maxconv.families.table import Family, cycle, each

CYCLE = 4  # three layers of sliding attention, then one of full attention


def rows(d: Dims):
    yield from ends(d)
    for layers in cycle(d.layers, CYCLE):
        yield from each(layers, norms(d), attention(d, at="attention"), gated_mlp(d))


def norms(d: Dims):
    """The norms after attention and MLP; those of queries and keys span all heads."""
    yield norm("post_self_attention_layer_norm", "post_attention_layernorm", d.emb)
    yield norm("post_mlp_layer_norm", "post_feedforward_layernorm", d.emb)
    yield norm("attention/query_norm", "self_attn.q_norm", d.heads * d.head_dim)
    yield norm("attention/key_norm", "self_attn.k_norm", d.kv_heads * d.head_dim)


OLMO3 = Family(
    architectures=("Olmo3ForCausalLM",),
    model_types=("olmo3",),
    decoder_block="olmo3",
    rows=rows,
    computes=Computation(
        settings=(epsilon(1e-5), activation(), window(4096)),
        fixed=(layer_kinds(lambda d, name: CYCLE),),
        bases={FULL: 500_000.0},
        split=True,
        has_sliding=True,
    ),
    pads_vocab=True,
)
