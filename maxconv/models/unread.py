"""What a checkpoint may be instead of plain weights, so that it cannot be read: each is named.

It is recognised by the tensors: an entry `quantization_config` is often left behind in the
config.json of weights that were dequantised.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxconv.errors import UserError
from maxconv.models.codecs import PLAIN, QUANTIZATION, packed_bits
from maxconv.models.lora import is_part
from maxconv.models.schema import entry
from maxconv.models.stored_names import no_weights
from maxconv.sources import Source, TensorInfo
from maxconv.sources.safetensors import some


@dataclass(frozen=True)
class Format:
    """A quantisation that is not read: what it is called, how names end, what to do about it."""

    name: str
    marks: tuple[str, ...]
    mend: str


FORMATS = (
    Format(
        "bitsandbytes",
        (".SCB", ".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4"),
        f"{PLAIN}, or dequantise it with transformers (model.dequantize()) and save it again",
    ),
    Format("NVFP4", ("_scale_2", "_global_scale"), PLAIN),
    Format("integers in the order of activations (g_idx)", ("weight_g_idx",), PLAIN),
    Format("sparse matrices", (".bitmask", ".compressed", ".scale_packed"), PLAIN),
    Format("HQQ", (".W_q",), PLAIN),
    Format("AQLM", (".codebooks",), PLAIN),
    Format("VPTQ", (".centroids.weight",), PLAIN),
    Format("SpQR", (".dense_weights",), PLAIN),
    Format("EETQ", (".weight_scales",), PLAIN),
    Format("torchao", ("_weight_qdata", ".weight:_data", ".int_data"), PLAIN),
)
_PACKED = Format(
    "GPTQ or AWQ",
    (".qweight", ".qzeros"),
    f"{PLAIN}, or dequantise it with GPTQModel and save it again",
)


def check_readable(source: Source) -> None:
    """UserError when a checkpoint is no model, or not in a form that is read."""
    beside = source.adapter.tensors if source.adapter else ()
    tensors = {name: info for name, info in source.tensors.items() if name not in beside}
    if problem := next(_problems(tensors, source.config), None):
        raise UserError(f"{source.root} {problem}.")


def _problems(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> Iterator[str]:
    parts = [name for name in tensors if is_part(name)]
    if parts and not any("norm" in name for name in tensors):  # which every model has
        yield (
            "is a LoRA adapter, not a model: give it as hf_lora_adapter_path=, and the model that "
            "it is of as --hf_model_path="
        )
    if parts:
        yield (
            f"holds an adapter that is not merged ({parts[0]}): merge it with PEFT "
            "(model.merge_and_unload()) and save it again"
        )
    if quantised := _quantised(tensors, config):
        yield quantised
    useless = {name for names in no_weights(tensors).values() for name in names}
    empty = [n for n, info in tensors.items() if 0 in info.shape and n not in useless]
    if empty:
        yield (
            f"has {len(empty)} tensors without values ({some(empty)}), as DeepSpeed ZeRO-3 saves "
            "them: save it again with stage3_gather_16bit_weights_on_model_save, or after "
            "zero_to_fp32.py"
        )


def _quantised(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> str | None:
    quantization = entry(config, QUANTIZATION, {})
    method = str(entry(quantization, "quant_method", ""))
    for form in FORMATS:
        if (found := _marked(tensors, form.marks)) is not None:
            return _sentence(form.name, found, method, form.mend)
    if (found := _marked(tensors, _PACKED.marks)) is not None:
        name = {"gptq": "GPTQ", "awq": "AWQ"}.get(method, _PACKED.name)
        return _sentence(name, found, "", _PACKED.mend)
    form = str(entry(quantization, "format", "")) or method
    for name, info in tensors.items():
        if name.endswith("weight_packed") and info.dtype != np.int32:
            return _sentence(f"{form} with weight_packed of {info.dtype}", name, method, PLAIN)
        if name.endswith("weight_packed") and (bits := packed_bits(quantization)) not in (4, 8):
            kind = f"packed integers of {bits} bits" if bits else "packed integers of several sizes"
            return _sentence(kind, name, method, PLAIN)
        is_read = info.dtype == np.int8 and f"{name}_scale" in tensors
        if method and name.endswith(".weight") and info.dtype.kind in "iu" and not is_read:
            return _sentence(f"{form} with weights of {info.dtype}", name, method, PLAIN)
    return None


def _marked(tensors: Mapping[str, TensorInfo], marks: Sequence[str]) -> str | None:
    return next((name for name in tensors if name.endswith(tuple(marks))), None)


def _sentence(kind: str, tensor: str, method: str, mend: str) -> str:
    of = f" ({method})" if method and method.lower() not in kind.lower() else ""
    return f"is quantised as {kind}{of}, which is not read: {tensor}; {mend}"
