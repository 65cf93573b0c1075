"""Published models at their full size, without their bytes: config.json and tensor headers.

Everything that happens before a conversion reads can be tested on them: what a checkpoint is, its
plan, what its cells compile to.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import shapes

from maxconv.sources import Part, Source, TensorInfo
from maxconv.sources.narrow import narrow
from maxconv.sources.safetensors import DTYPES


class HeaderSource(Source):
    """The headers of a checkpoint; to read its tensors is an error."""

    def __init__(self, root: str, config: Mapping[str, Any], tensors: Sequence[TensorInfo]):
        super().__init__()
        self.root, self.revision, self.notices = root, None, ()
        self.config = dict(config)
        self.tensors = {t.name: replace(t, dtype=narrow(t.dtype)) for t in tensors}

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        raise OSError(f"{self.root} is headers only: there is no {info.name} to read")

    def close(self) -> None:
        pass


def published(model_name: str, dtype: str = "BF16", layers: int | None = None) -> HeaderSource:
    """A model by MaxText's name, as Hugging Face publishes it: a file of `data/published`.

    Args:
        model_name: a row of `configs/models.yml`.
        dtype: of its tensors, as safetensors names it, where the file does not say.
        layers: take only so many, as if the model had no more.
    """
    content = shapes.load(shapes.DATA / "published" / f"{model_name}.json")
    config = content["config"]
    if layers is not None:
        config["num_hidden_layers"] = layers
    infos: list[TensorInfo] = []
    for name, stated in content["tensors"].items():
        number = re.match(r"model\.layers\.(\d+)\.", name)
        if layers is not None and number and int(number[1]) >= layers:
            continue
        own, shape = shapes.split(stated)
        infos.append(TensorInfo(name, own or DTYPES[dtype], shape))
    return HeaderSource(content["hf_id"], config, infos)


def quantised(source: HeaderSource, codec: str) -> HeaderSource:
    """The same model with its large weights as a codec stores them, and its `quantization_config`.

    `fp8` and `mxfp4` are as DeepSeek and OpenAI publish theirs; `int4` as Moonshot does (Kimi-K2),
    for experts alone where there are any.
    """
    infos: list[TensorInfo] = []
    has_experts = any(".experts." in name for name in source.tensors)
    for name, info in source.tensors.items():
        parts = {"": ("BF16", info.shape)}
        if codec == "mxfp4":
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, inner, outer = info.shape
                groups = (experts, outer, inner // 32)
                parts = {"_blocks": ("U8", (*groups, 16)), "_scales": ("U8", groups)}
        elif re.search(r"_proj(_with_mqa)?\.weight$", name):
            rows, columns = info.shape
            if codec == "fp8":
                grid = (-(-rows // 128), -(-columns // 128))
                parts = {"": ("F8_E4M3", info.shape), "_scale_inv": ("F32", grid)}
            elif not has_experts or ".experts." in name:
                parts = {
                    "_packed": ("I32", (rows, columns // 8)),
                    "_scale": ("BF16", (rows, columns // 32)),
                    "_shape": ("I32", (2,)),
                }
        infos += [TensorInfo(name + e, DTYPES[t], s) for e, (t, s) in parts.items()]
    return HeaderSource(source.root, source.config, infos)


def write_headers(source: HeaderSource, directory: Path) -> None:
    """A checkpoint of the full size that takes no room: its file is a hole behind the header."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, info in source.tensors.items():
        offsets = [end, end := end + math.prod(info.shape) * info.dtype.itemsize]
        shape = list(info.shape)
        header[name] = {"dtype": codes[info.dtype], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(source.config))
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
