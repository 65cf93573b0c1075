"""A checkpoint together with a LoRA adapter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from maxconv.algebra.boxes import Box
from maxconv.sources.base import Part, Source, TensorInfo, Traffic


class AdaptedSource(Source):
    """Both as one source: `tensors` includes those of `adapter`."""

    def __init__(self, base: Source, adapter: Source):
        super().__init__()
        self.root, self.revision, self.config = base.root, base.revision, base.config
        self.contradictory = base.contradictory
        self.notices = (*base.notices, *adapter.notices)
        self.tensors = {**base.tensors, **adapter.tensors}
        self.adapter = self._adapter = adapter
        self._base = base
        self.readers, self.is_shared = base.readers, base.is_shared
        base.stats = adapter.stats = self.stats

    @property
    def traffic(self) -> Traffic:
        return self._base.traffic.plus(self._adapter.traffic)

    def allow(self, nbytes: int) -> None:
        for source in (self._base, self._adapter):
            source.allow(nbytes)

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        self._owner(info).read(info, parts)

    def held(self, ahead: int) -> int:
        return self._base.held(ahead) + self._adapter.held(ahead)

    def between(self, info: TensorInfo, boxes: Sequence[Box]) -> int:
        return self._owner(info).between(info, boxes)

    def _owner(self, info: TensorInfo) -> Source:
        return self._adapter if info.name in self._adapter.tensors else self._base

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        return self._owner(info).plain(info, box)

    def path(self, info: TensorInfo) -> Path | None:
        return self._owner(info).path(info)

    def versions(self) -> dict[str, str]:
        return {**self._base.versions(), **_named(self._adapter.versions())}

    def fingerprints(self) -> Mapping[str, str]:
        return {**self._base.fingerprints(), **_named(self._adapter.fingerprints())}

    def close(self) -> None:
        self._adapter.close()
        self._base.close()


def _named(versions: Mapping[str, str]) -> dict[str, str]:
    return {f"{name} of the adapter": version for name, version in versions.items()}
