"""Checkpoints that are directories of safetensors files, wherever these are stored."""

import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from maxconv.algebra.boxes import Box, dims, intersect, slices
from maxconv.algebra.storage import blocks, coalesce, runs
from maxconv.errors import UserError
from maxconv.sources.base import Part, Source, TensorInfo, aligned_empty, bit_views
from maxconv.sources.index import (
    ADAPTER,
    Choice,
    check_distinct,
    check_index,
    check_kind,
    choose,
    notices,
)
from maxconv.sources.narrow import narrow, narrowed
from maxconv.sources.safetensors import StoredTensor, check_lfs, load_object, parse_header, some

# Beside the weights and their index.
_COMPANION = re.compile(
    r"(?!\.|.*\.index\.json$)(.*\.(json|jinja|model|py|tiktoken|txt)|(LICENSE|NOTICE|USE_POLICY)[^/]*)"
)


class FileSource(Source, ABC):
    """A directory with safetensors files and a config.json.

    The tensors are those of the files that `index.choose` chooses. Subclasses list files and fetch
    byte ranges.

    Attributes:
        stored: the file, offset and stored dtype of each of `tensors`.
        block: maximum bytes per fetch when the result has to be copied to its destination.
    """

    stored: Mapping[str, StoredTensor]
    # Measured with files in the page cache: the block is still in the CPU cache when it is copied,
    # and smaller blocks cost more calls.
    block: int = 4 << 20

    # ---- contents

    def _examine(self, config: str, problems: Sequence[str] = ()) -> None:
        """Sets the attributes of the source from the file `config` and all headers.

        Raises:
            UserError: with everything that is wrong with the directory, including `problems`.
        """
        names, problems = self._names(), list(problems)
        self._digests: dict[str, str] = {}
        self.config, self.contradictory = {}, []
        with _collect(problems):
            check_kind(self.root, names, config)
            self.config = self._object(config, None if config == ADAPTER else self.contradictory)
        choice = Choice([])
        with _collect(problems):
            choice = choose(self.root, names, config, self.config, self._object)
        problems += choice.problems
        headers: dict[str, tuple[StoredTensor, ...]] = {}
        for file in choice.files:
            with _collect(problems):
                raw, size = self._header(file)
                headers[file] = parse_header(raw, file, size)
                self._digests[file] = _digest(raw)
        where = choice.where
        problems += check_distinct(headers) if where is None else check_index(headers, choice)
        if problems:
            raise UserError(problems)

        self.stored = {
            info.name: info
            for header in headers.values()
            for info in header
            if where is None or where.get(info.name) == info.file
        }
        self.tensors = {
            name: TensorInfo(name, narrow(info.dtype), info.shape)
            for name, info in self.stored.items()
        }
        self.notices = notices(self.root, names, headers, self.stored, choice.by)
        if self.contradictory:
            said = f"{config} has {some(self.contradictory)} more than once; the last counts."
            self.notices.append(said)

    def _object(self, file: str, contradictory: list[str] | None = None) -> dict[str, Any]:
        raw = self._content(file)
        self._digests[file] = _digest(raw)
        check_lfs(raw, file)
        problems: list[str] = []
        value = load_object(raw, file, problems, contradictory)
        if problems:
            raise UserError(problems)
        return value

    def held(self, ahead: int) -> int:
        """Each reader holds one block to copy from."""
        return min(self.readers * self.block, ahead)

    def plain(self, info: TensorInfo, box: Box) -> np.ndarray:
        """Row by row, without coalescing, at offsets computed by numpy."""
        stored = self.stored[info.name]
        *rows, (lo, hi) = box or ((0, 1),)
        *outer, last = info.shape or (1,)
        starts = np.zeros(1, np.int64)
        if rows:
            grid = np.broadcast_arrays(*np.ix_(*(np.arange(*row) for row in rows)))
            starts = np.ravel_multi_index(grid, outer).reshape(-1)
        itemsize = stored.dtype.itemsize
        offsets, nbytes = stored.offset + (starts * last + lo) * itemsize, (hi - lo) * itemsize
        found = np.empty(len(offsets) * nbytes, np.uint8)
        self._fetch(stored, offsets.tolist(), nbytes, found.data)
        return narrowed(found.view(stored.dtype).reshape(dims(box)), info.name)

    @property
    def companions(self) -> list[str]:
        """The names of the small files that belong to the model: config, tokenizer, code."""
        small = (name for name in self._names() if _COMPANION.fullmatch(name))
        return sorted(small)

    def content(self, file: str) -> bytes:
        """The contents of a small file; UserError if it cannot be read."""
        return self._content(file)

    @property
    def files(self) -> list[str]:
        """The files that hold tensors."""
        return sorted({info.file for info in self.stored.values()})

    @property
    def read_files(self) -> list[str]:
        """All files that were read so far: those that hold tensors, and what describes them."""
        return sorted(self._digests)

    @abstractmethod
    def _names(self) -> set[str]:
        """The names of the files."""

    @abstractmethod
    def _content(self, file: str) -> bytes:
        """The contents of a small file; UserError if it cannot be read or is too large."""

    @abstractmethod
    def _header(self, file: str) -> tuple[bytes, int]:
        """The first bytes of a safetensors file, up to its data, and the file's size."""

    # ---- reading

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        """See `Source.read`. Reads every byte of the boxes once, and no other byte, unless the
        storage reads through gaps (see `between`).

        C-contiguous arrays are filled without a copy, unless their box interleaves with others in
        the file.
        """
        stored = self.stored[info.name]
        is_direct = stored.dtype == info.dtype
        scratch = np.empty(0, np.uint8)
        for outer, inner in self._groups(stored, bit_views(info, parts)):
            self.stats.add(math.prod(dims(outer)) * info.dtype.itemsize, 0)
            (_, array), *others = inner
            if is_direct and not others and array.flags.c_contiguous:
                self._fill(stored, outer, array)
                continue
            for box in blocks(outer, stored.dtype.itemsize, self.block):
                shape = dims(box)
                nbytes = math.prod(shape) * stored.dtype.itemsize
                if scratch.nbytes < nbytes:
                    scratch = aligned_empty((nbytes,), np.uint8)
                block = scratch[:nbytes].view(stored.dtype).reshape(shape)
                self._fill(stored, box, block)
                _scatter(box, narrowed(block, info.name), inner)

    def _groups(
        self, stored: StoredTensor, parts: Sequence[Part]
    ) -> Iterator[tuple[Box, Sequence[Part]]]:
        """Boxes to read one after another, each with the parts that it covers."""
        together: list[Part] = []
        for part in parts:
            box, array = part
            offsets, nbytes = runs(stored.shape, box, stored.dtype.itemsize)
            # A long run gains nothing from being coalesced, and on its own needs no copy.
            if len(offsets) == 1 and nbytes >= self.block and array.flags.c_contiguous:
                yield box, [part]
            else:
                together.append(part)
        for outer in coalesce([box for box, _ in together]):
            yield outer, [part for part in together if intersect(outer, part[0]) is not None]

    def _fill(self, stored: StoredTensor, box: Box, array: np.ndarray) -> None:
        """Reads a box straight into a C-contiguous array."""
        offsets, nbytes = runs(stored.shape, box, stored.dtype.itemsize)
        buffer = array.reshape(-1).view(np.uint8).data
        self._fetch(stored, (offsets + stored.offset).tolist(), nbytes, buffer)
        self.stats.add(0, len(offsets))

    @abstractmethod
    def _fetch(
        self, stored: StoredTensor, offsets: Sequence[int], nbytes: int, buffer: memoryview
    ) -> None:
        """Fills `buffer` with the runs of `nbytes` bytes at `offsets` of the tensor's file.

        Raises:
            OSError: its message names the file and the tensor.
        """


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Collects the problems of a UserError instead of raising it, so that more can be found."""
    try:
        yield
    except UserError as error:
        problems += error.problems


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _scatter(box: Box, block: np.ndarray, parts: Iterable[Part]) -> None:
    """Copies a block, which is a box of a tensor, to the parts that overlap it."""
    bits = block.view(f"u{block.dtype.itemsize}")
    for target, array in parts:
        if (common := intersect(box, target)) is not None:
            array[slices(common, target)] = bits[slices(common, box)]
