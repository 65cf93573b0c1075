import gzip
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import pytest
from flax.linen.spmd import logical_to_mesh_axes
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from maxconv.config import Config, parse
from maxconv.config.mesh import device_array, make_mesh, parallelism, partition_spec
from maxconv.errors import UserError

TREES = sorted((Path(__file__).parent / "data" / "trees").glob("*.json.gz"))
RULES = parse([], {}).logical_axis_rules
AXES = parse([], {}).mesh_axes


def config(line: str = "") -> Config:
    return parse(line.split(), {})


def sizes(line: str, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    ici, dcn = parallelism(config(line), num_devices, num_slices)
    shape = {axis: ici[axis] * dcn[axis] for axis in ici}
    assert tuple(shape) == config(line).mesh_axes
    return {axis: size for axis, size in shape.items() if size != 1}


@pytest.mark.parametrize("path", TREES, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_specs_equal_maxtexts(path: Path) -> None:
    """`path` holds the PartitionSpec that MaxText's training gives to each weight."""
    tree = json.loads(gzip.decompress(path.read_bytes()))
    assert tree["leaves"] and tree["meshes"]
    name = re.split(r"\.(?:un)?scan", path.name)[0]
    rules = parse([f"model_name={name}"], {}).logical_axis_rules  # a model may have its own
    for leaf in tree["leaves"]:
        for mesh, axes in tree["meshes"].items():
            if len(leaf["logical"] or ()) < len(leaf["shape"]) or mesh in leaf.get(
                "indivisible", ()
            ):
                continue
            axes = axes.get("axes", axes)  # some files say how the tree was made, too
            want = P(*(tuple(e) if isinstance(e, list) else e for e in leaf["spec"][mesh]))
            got = partition_spec(leaf["logical"], leaf["shape"], axes, rules)
            assert got == (want, ()), (leaf["path"], mesh)


@given(
    st.lists(st.sampled_from([name for name, _ in RULES] + ["unknown"]), max_size=4, unique=True),
    st.integers(0, 4),
    st.dictionaries(st.sampled_from(AXES), st.integers(1, 3)),
)
def test_rules_equal_flax(names: list[str], place: int, mesh: dict[str, int]) -> None:
    logical = (*names[:place], None, *names[place:])
    spec = logical_to_mesh_axes(logical, RULES)
    assert spec is not None
    want = [_without_ones(entry, mesh) for entry in spec]
    shape = [6**12] * len(logical)
    assert partition_spec(logical, shape, mesh, RULES) == (P(*want), ())


def _without_ones(entry: Any, mesh: Mapping[str, int]) -> tuple[str, ...]:
    axes = entry if isinstance(entry, tuple) else () if entry is None else (entry,)
    return tuple(axis for axis in axes if mesh.get(axis, 1) > 1)


def test_what_does_not_divide_is_replicated() -> None:
    logical = ("embed_attn", "kv_heads", "kv_head_dim")
    spec, dropped = partition_spec(logical, (8, 3, 4), {"fsdp": 4, "tensor": 2}, RULES)
    assert spec == P("fsdp", None, None)
    assert dropped == ("kv_heads 3 is not divisible by tensor=2",)
    mesh = {"fsdp": 2, "context": 3, "expert": 4}
    spec, dropped = partition_spec(("embed",), (8,), mesh, RULES)
    assert spec == P(("fsdp", "expert"))
    assert dropped == ("embed 8 is not divisible by fsdp=2 * context=3",)


def test_names_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        partition_spec(("embed", "embed"), (2, 2), {}, RULES)


def test_mesh_shapes() -> None:
    assert sizes("", 8) == {"fsdp": 8}
    assert sizes("", 1) == {}
    assert sizes("ici_fsdp_parallelism=4 ici_tensor_parallelism=2", 8) == {"fsdp": 4, "tensor": 2}
    assert sizes("ici_tensor_parallelism=2", 8) == {"fsdp": 4, "tensor": 2}
    assert sizes("ici_fsdp_parallelism=1 ici_data_parallelism=-1", 8) == {"data": 8}
    # Without an axis named `sequence`, that parallelism is nothing.
    assert sizes("ici_sequence_parallelism=4", 8) == {"fsdp": 8}
    assert sizes("mesh_axes=[model,data] ici_tensor_parallelism=2 ici_data_parallelism=-1", 8) == {
        "model": 2,
        "data": 4,
    }
    assert sizes("dcn_data_parallelism=5", 8) == {"fsdp": 8}


def test_mesh_shapes_of_slices() -> None:
    assert sizes("", 16, 2) == {"data": 2, "fsdp": 8}
    assert sizes("dcn_fsdp_parallelism=2 dcn_data_parallelism=1", 16, 2) == {"fsdp": 16}


@pytest.mark.parametrize(
    ("line", "num_slices", "sentence"),
    [
        (
            "ici_fsdp_parallelism=4 ici_tensor_parallelism=4",
            1,
            "ici_fsdp_parallelism=4 ici_tensor_parallelism=4: the product does not fit the 8 "
            "devices (of a slice); ici_tensor_parallelism=4 ici_fsdp_parallelism=2 would fit.",
        ),
        (
            "ici_tensor_parallelism=3",
            1,
            "ici_fsdp_parallelism=-1 ici_tensor_parallelism=3: the product does not fit the 8 "
            "devices (of a slice); ici_fsdp_parallelism=8 alone would fit.",
        ),
        (
            "ici_tensor_parallelism=-1",
            1,
            "ici_fsdp_parallelism=-1 ici_tensor_parallelism=-1: more than one is -1; "
            "ici_fsdp_parallelism=8 would fit.",
        ),
        (
            "ici_fsdp_parallelism=1",
            1,
            "All sizes 1: the product does not fit the 8 devices (of a slice); "
            "ici_fsdp_parallelism=8 would fit.",
        ),
        (
            "dcn_data_parallelism=4",
            2,
            "dcn_data_parallelism=4: the product does not fit the 2 slices; "
            "dcn_data_parallelism=2 would fit.",
        ),
        ("", 3, "8 devices are not divisible by num_slices=3."),
    ],
)
def test_mesh_misfits(line: str, num_slices: int, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        parallelism(config(line), 8, num_slices)
    assert error.value.problems == (sentence,)


def test_make_mesh() -> None:
    mesh = make_mesh(config("ici_tensor_parallelism=2"))
    assert mesh.axis_names == AXES and mesh.size == jax.device_count()
    assert mesh.shape["tensor"] == 2 and mesh.shape["fsdp"] == jax.device_count() // 2
    assert set(mesh.axis_types) == {AxisType.Auto}
    spec, dropped = partition_spec(("embed", "mlp"), (16, 6), dict(mesh.shape), RULES)
    assert spec == P("fsdp", "tensor") and not dropped
    assert make_mesh(config(), jax.devices()[:1]).size == 1
    with pytest.raises(UserError, match="there are 1 slice"):
        make_mesh(config("num_slices=2"))


@dataclass(frozen=True)
class FakeTpu:
    """A v5e chip of a slice of 2 x 4."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def slice_index(self) -> int:
        return self.id // 8

    @property
    def process_index(self) -> int:
        return self.id // 4

    @property
    def coords(self) -> tuple[int, int, int]:
        return (self.id % 2, self.id % 8 // 2, 0)


def test_slices_are_kept_together() -> None:
    devices = [FakeTpu(i) for i in range(16)]
    array = device_array(config("ici_tensor_parallelism=2"), devices)
    shape = dict(zip(AXES, array.shape, strict=True))
    assert {a: n for a, n in shape.items() if n != 1} == {"data": 2, "fsdp": 4, "tensor": 2}
    for index, slice_devices in enumerate(array.reshape(2, 8)):
        assert {device.slice_index for device in slice_devices} == {index}
    assert (array == device_array(config("ici_tensor_parallelism=2 num_slices=2"), devices)).all()
