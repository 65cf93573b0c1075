"""Published models at their full size, without their bytes: config.json and tensor headers.

Everything that happens before a conversion reads can be tested on them: what a checkpoint is, its
plan, what its cells compile to.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import shapes

from maxconv.sources import Source, TensorInfo
from maxconv.sources.safetensors import DTYPES


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
    offset = 0
    for name, stated in content["tensors"].items():
        number = re.match(r"model\.layers\.(\d+)\.", name)
        if layers is not None and number and int(number[1]) >= layers:
            continue
        own, shape = shapes.split(stated)
        infos.append(TensorInfo(name, own or DTYPES[dtype], shape, "model.safetensors", offset))
        offset += infos[-1].nbytes
    return HeaderSource(content["hf_id"], config, infos)


def quantised(source: HeaderSource) -> HeaderSource:
    """The same model as DeepSeek (block fp8) and OpenAI (MXFP4) publish theirs."""
    infos: list[TensorInfo] = []
    are_fused = any(name.endswith("experts.gate_up_proj") for name in source.tensors)
    for name, info in source.tensors.items():
        if not are_fused and re.search(r"_proj(_with_mqa)?\.weight$", name):
            grid = tuple(-(-n // 128) for n in info.shape)
            parts = {"": ("F8_E4M3", info.shape), "_scale_inv": ("F32", grid)}
        elif name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inner, outer = info.shape
            groups = (experts, outer, inner // 32)
            parts = {"_blocks": ("U8", (*groups, 16)), "_scales": ("U8", groups)}
        else:
            parts = {"": ("BF16", info.shape)}
        infos += [TensorInfo(name + e, DTYPES[t], s, info.file, 0) for e, (t, s) in parts.items()]
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
