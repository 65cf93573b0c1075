"""The registry of model families. To add one, write a file here and add it to FAMILIES."""

from maxconv.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32
from maxconv.families.deepseek4 import DEEPSEEK_V4
from maxconv.families.dims import Dims, matters, number_after, stated, stated_sizes, text_entries
from maxconv.families.gemma import GEMMA, GEMMA2, GEMMA3
from maxconv.families.gemma4 import GEMMA4, GEMMA4_SMALL
from maxconv.families.gpt_oss import GPT_OSS
from maxconv.families.llama import LLAMA
from maxconv.families.llama4 import LLAMA4
from maxconv.families.mistral import MISTRAL
from maxconv.families.mixtral import MIXTRAL
from maxconv.families.olmo3 import OLMO3
from maxconv.families.qwen import QWEN2, QWEN3, QWEN3_MOE
from maxconv.families.qwen3_5 import QWEN3_5_MOE
from maxconv.families.qwen_next import QWEN3_NEXT
from maxconv.families.qwen_vl import QWEN3_OMNI_MOE, QWEN3_VL, QWEN3_VL_MOE, WEAVER
from maxconv.families.table import (
    Family,
    Layers,
    Parameter,
    Row,
    bind_rows,
    flat,
    paths,
    row,
    stack_lengths,
)

FAMILIES: tuple[Family, ...] = (
    LLAMA,
    LLAMA4,
    MISTRAL,
    MIXTRAL,
    GPT_OSS,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V32,
    DEEPSEEK_V4,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA4_SMALL,
    GEMMA4,
    OLMO3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN3_5_MOE,
    QWEN3_VL,
    QWEN3_VL_MOE,
    QWEN3_OMNI_MOE,
    WEAVER,
)

BY_ARCHITECTURE: dict[str, list[Family]] = {}
for _family in FAMILIES:
    for _name in _family.architectures:
        BY_ARCHITECTURE.setdefault(_name, []).append(_family)

__all__ = [
    "BY_ARCHITECTURE",
    "FAMILIES",
    "Dims",
    "Family",
    "Layers",
    "Parameter",
    "Row",
    "bind_rows",
    "flat",
    "matters",
    "number_after",
    "paths",
    "row",
    "stack_lengths",
    "stated",
    "stated_sizes",
    "text_entries",
]
