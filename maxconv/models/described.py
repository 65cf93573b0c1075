"""A model by its config.json alone: the tensors that its checkpoint would have, without numbers."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from maxconv.algebra import Shape, Tensor
from maxconv.algebra.stated import stated_shapes
from maxconv.errors import UserError
from maxconv.families import Row, stated
from maxconv.models import schema
from maxconv.models.architecture import check_entries, family_of
from maxconv.models.codecs import unquantised
from maxconv.sources import Part, Source, TensorInfo
from maxconv.sources.safetensors import load_object, some


def is_description(path: str) -> bool:
    """Whether a path is that of a config.json alone."""
    return path.endswith(".json") and "://" not in path


class DescribedModel(Source):
    """The tensors that a family's table reads, with the shapes that it states.

    Names and shapes are those of a checkpoint that is not quantised, and has a tensor for whatever
    the table reads.

    Raises:
        UserError: config.json cannot be read, or is of no family that is known.
    """

    def __init__(self, path: str):
        super().__init__()
        self.root, self.revision, self.notices = path, None, ()
        problems: list[str] = []
        try:
            raw = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}; check the path.") from None
        found = load_object(raw, path, problems)
        if problems:
            raise UserError(problems)
        self.config = unquantised(found)
        family = family_of(self, None)
        check_entries(self, schema.sizes(family.sizes))
        parts = stated(self.config, ("vision_config", "audio_config"))
        try:
            dims = replace(
                family.dims(self.config),
                multimodal="vision_config" in parts and bool(family.encoders),
                audio="audio_config" in parts and bool(family.audio_patterns),
            )
        except KeyError as error:
            raise UserError(f"{path} has no entry {error}; give the whole config.json.") from None
        dtype = np.dtype("bfloat16")
        shapes = tensor_shapes(family.rows(dims))
        self.tensors = {name: TensorInfo(name, dtype, shape) for name, shape in shapes.items()}

    def read(self, info: TensorInfo, parts: Sequence[Part]) -> None:
        raise OSError(f"{self.root} describes a model; it has no weights such as {info.name}")

    def close(self) -> None:
        """Nothing is open."""


def tensor_shapes(rows: Iterable[Row]) -> dict[str, Shape]:
    """The tensors that a table reads, with their shapes.

    Raises:
        UserError: the table does not state a shape.
    """
    found: dict[str, list[tuple[int | None, ...]]] = {}
    for row in rows:
        for template, shape in stated_shapes(row.expr):
            for name in replace(row, expr=Tensor(template)).names():
                found.setdefault(name, []).append(shape)
    shapes = {
        name: tuple(
            max((n for n in along if n is not None), default=0) for along in zip(*of, strict=True)
        )
        for name, of in found.items()
    }
    if unknown := sorted(name for name, shape in shapes.items() if not shape or 0 in shape):
        raise UserError(f"The shapes of {some(unknown)} do not follow from config.json.")
    return shapes
