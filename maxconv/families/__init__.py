"""The registry of families. A new one is a file here and a line in FAMILIES."""

from maxconv.families.llama import LLAMA
from maxconv.families.mistral import MISTRAL
from maxconv.families.qwen import QWEN2, QWEN3
from maxconv.families.table import Dims, Family, Leaf, Row, bind_rows, row

FAMILIES: tuple[Family, ...] = (LLAMA, MISTRAL, QWEN2, QWEN3)

BY_ARCHITECTURE = {name: family for family in FAMILIES for name in family.architectures}

__all__ = ["BY_ARCHITECTURE", "FAMILIES", "Dims", "Family", "Leaf", "Row", "bind_rows", "row"]
