"""A checkpoint and a LoRA adapter beside it."""

from collections.abc import Sequence
from pathlib import Path

from maxconv.algebra.boxes import Box
from maxconv.sources.base import Source, Traffic
from maxconv.sources.safetensors import TensorInfo


class AdaptedSource(Source):
    """Both as one source: `tensors` holds the adapter's, too, and `adapter` tells them apart."""

    def __init__(self, base: Source, adapter: Source):
        super().__init__()
        self.root, self.revision, self.config = base.root, base.revision, base.config
        self.notices = (*base.notices, *adapter.notices)
        self.tensors = {**base.tensors, **adapter.tensors}
        self.adapter = self._adapter = adapter
        self._base = base
        self.block, self.readers, self.is_shared = base.block, base.readers, base.is_shared

    @property
    def traffic(self) -> Traffic:
        return self._base.traffic.plus(self._adapter.traffic)

    def allow(self, nbytes: int) -> None:
        for source in (self._base, self._adapter):
            source.allow(nbytes)

    def held(self, ahead: int) -> int:
        return self._base.held(ahead) + self._adapter.held(ahead)

    def between(self, info: TensorInfo, boxes: Sequence[Box]) -> int:
        return self._owner(info).between(info, boxes)

    def _owner(self, info: TensorInfo) -> Source:
        return self._adapter if info.name in self._adapter.tensors else self._base

    def _fetch(
        self, info: TensorInfo, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        self._owner(info)._fetch(info, offsets, nbytes, buffer)

    def path(self, info: TensorInfo) -> Path | None:
        return self._owner(info).path(info)

    def versions(self) -> dict[str, str]:
        adapter = {f"{name} of the adapter": v for name, v in self._adapter.versions().items()}
        return self._base.versions() | adapter

    def close(self) -> None:
        self._adapter.close()
        self._base.close()
