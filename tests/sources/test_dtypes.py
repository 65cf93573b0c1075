"""Every dtype of safetensors, as a weight and beside one: what is made is what numpy makes."""

import json
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny
from jobs import job_words
from plans import make_leaf
from safetensors.numpy import load_file

from maxconv.algebra import Tensor, evaluate
from maxconv.config import parse
from maxconv.errors import ConversionError, UserError
from maxconv.execution.engine import Engine
from maxconv.jobs.prepare import prepared
from maxconv.models.codecs import decoded
from maxconv.sources import LocalSource
from maxconv.sources.narrow import narrow
from maxconv.sources.safetensors import DTYPES

REAL = [code for code, dtype in DTYPES.items() if dtype.kind not in "bc"]


def save(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes model.safetensors by hand: the library's numpy side lacks some dtypes."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, data = {}, b""
    for name, x in arrays.items():
        offsets = [len(data), len(data) + x.nbytes]
        header[name] = {"dtype": codes[x.dtype], "shape": x.shape, "data_offsets": offsets}
        data += x.tobytes()
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


def numbers(name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Numbers all over a dtype's range; of float64 also such as lie next to the middle between two
    bfloat16, where rounding twice may go wrong."""
    random = np.random.default_rng(len(name))
    if dtype.kind in "iu":
        limits = np.iinfo(dtype if dtype.itemsize < 8 else f"{dtype.kind}4")
        return random.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    x = tiny.values(name, shape).astype(np.float64)
    if dtype == np.float64:
        x = x.astype(ml_dtypes.bfloat16).astype(np.float64) * (1 + 2.0**-9)
        x *= 1 + random.choice([-1, 0, 1], shape) * 2.0 ** -random.integers(20, 50, shape)
        x.flat[:4] = 1e300, -1e-300, np.inf, np.nan
    with np.errstate(all="ignore"):
        return np.abs(x).astype(dtype) if dtype == ml_dtypes.float8_e8m0fnu else x.astype(dtype)


def leaves(directory: Path, case: str, *words: str, only: str = "") -> tuple[dict, dict]:
    """What is made of the checkpoint in a directory, by name; and the expressions of all that.

    `only`: what the names of leaves that are made have in them.
    """
    words = tuple(job_words(directory, directory, tiny.maxtext_words(case, True), "fsdp8", words))
    with prepared(parse(words)) as job, Engine(job.plan, job.source, window=1 << 20) as engine:
        made = {
            leaf.name: np.asarray(make_leaf(engine, leaf))
            for leaf in job.plan.leaves
            if only in leaf.name
        }
        assert only or job.source.stats.bytes_read == job.plan.read_nbytes(0)
        return made, {leaf.name: leaf.leaf.expr for leaf in job.plan.leaves}


def plain(directory: Path, case: str = "llama3.1-8b") -> dict[str, np.ndarray]:
    tiny.write(case, directory, shard_bytes=None)
    return load_file(directory / "model.safetensors")


def bits(x: np.ndarray) -> np.ndarray:
    """With one NaN for all: their payload is nobody's business."""
    return np.where(np.isnan(x), np.array(np.nan, x.dtype), x).view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize("to", ["bfloat16", "float32"])
def test_weights_are_rounded_as_numpy_does(to: str, tmp_path: Path) -> None:
    """Each tensor in another dtype; scaled ones, such as queries, in several."""
    stored = plain(tmp_path)
    codes = dict(zip(stored, cycle(REAL), strict=False))
    queries = [name for name in stored if name.endswith("q_proj.weight")]
    codes |= dict(zip(queries, ("F64", "I32", "I64"), strict=True))
    assert set(codes.values()) == set(REAL)
    arrays = {n: numbers(n, x.shape, DTYPES[codes[n]]) for n, x in stored.items()}
    save(tmp_path, arrays)
    made, exprs = leaves(tmp_path, "llama3.1-8b", f"--save_dtype={to}")
    with np.errstate(all="ignore"):
        rounded = {n: x.astype(to) for n, x in arrays.items()}
        for name, expr in exprs.items():
            want = evaluate(expr, rounded).astype(to)
            np.testing.assert_array_equal(bits(made[name]), bits(want), name)


@pytest.mark.parametrize("code", ["BOOL", "C64"])
def test_what_is_no_real_number_is_no_weight(code: str, tmp_path: Path) -> None:
    arrays = plain(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    arrays[name] = np.ones(arrays[name].shape, DTYPES[code])
    save(tmp_path, arrays)
    with pytest.raises(UserError, match=f"tensor {name} is {DTYPES[code]}, but weights are real"):
        leaves(tmp_path, "llama3.1-8b")


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1, 2**63 - 1])
def test_integers_out_of_range_are_not_cut(value: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save(tmp_path, {"x": np.array([[1, value], [2, 3]])})
    with LocalSource(tmp_path) as source:
        info, row = source.tensors["x"], np.empty((1, 2), np.int32)
        with pytest.raises(ConversionError, match=f"Tensor 'x' holds {value}, which does not fit"):
            source.tensor("x")
        source.read(info, [(((1, 2), (0, 2)), row)])
        assert row.tolist() == [[2, 3]]


def test_scales_of_fp8_blocks_are_numbers_of_any_dtype(tmp_path: Path) -> None:
    """float64 scales count as float32, in which dequantising is done."""
    arrays = plain(tmp_path, "qwen3-8b")
    packed, plain_arrays, random = dict(arrays), dict(arrays), np.random.default_rng(0)
    codes = cycle(REAL)
    for name, x in arrays.items():
        if "_proj" not in name:
            continue
        grid = tuple(-(-n // 16) for n in x.shape)
        scale = numbers(name + "_scale_inv", grid, DTYPES[next(codes)])
        with np.errstate(all="ignore"):
            is_finite = np.isfinite(scale.astype(np.float32))
        scale = np.where(is_finite, scale, np.ones_like(scale))
        weight = random.standard_normal(x.shape).astype(ml_dtypes.float8_e4m3fn)
        packed |= {name: weight, name + "_scale_inv": scale}
        wide = scale.astype(np.float32).repeat(16, 0)[: x.shape[0]].repeat(16, 1)[:, : x.shape[1]]
        plain_arrays[name] = (weight.astype(np.float32) * wide).astype(ml_dtypes.bfloat16)
    assert {x.dtype for n, x in packed.items() if "scale" in n} >= {DTYPES[code] for code in REAL}
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"weight_block_size": [16, 16]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(tmp_path, packed)
    made, _ = leaves(tmp_path, "qwen3-8b")
    plain(tmp_path / "decoded", "qwen3-8b")
    save(tmp_path / "decoded", plain_arrays)
    _, exprs = leaves(tmp_path / "decoded", "qwen3-8b", only="no leaf")
    for name, expr in exprs.items():
        np.testing.assert_array_equal(bits(made[name]), bits(evaluate(expr, plain_arrays)), name)


@pytest.mark.parametrize(
    "codes", [("U8", "I8", "I16"), ("U16", "I32", "U32"), ("I64", "U64", "I64")]
)
def test_tables_of_integers_are_integers(codes: tuple[str, ...], tmp_path: Path) -> None:
    case = "deepseek4-284b"
    arrays = plain(tmp_path, case)
    tables = [name for name in arrays if name.endswith("tid2eid")]
    for name, code in zip(tables, codes, strict=True):
        table = np.arange(arrays[name].size) % 4
        arrays[name] = table.reshape(arrays[name].shape).astype(DTYPES[code])
    save(tmp_path, arrays)
    made, exprs = leaves(tmp_path, case, only="tid2eid")
    for name, table in made.items():
        assert table.dtype == np.int32
        np.testing.assert_array_equal(table, evaluate(exprs[name], arrays))
    arrays[tables[0]] = arrays[tables[0]].astype(np.float32)
    save(tmp_path, arrays)
    with pytest.raises(UserError, match="tid2eid is float32, but the leaf in MaxText has integers"):
        leaves(tmp_path, case)


@pytest.mark.parametrize("code", [code for code in DTYPES if code != "U8"])
@pytest.mark.parametrize("part", ["w_blocks", "w_scales"])
def test_bit_patterns_are_of_one_dtype(code: str, part: str) -> None:
    """What is decoded bit by bit would be garbage of any other dtype."""
    shapes = {"w_blocks": (3, 10, 2, 16), "w_scales": (3, 10, 2)}
    dtypes = {name: np.dtype(np.uint8) for name in shapes} | {part: narrow(DTYPES[code])}
    with pytest.raises(UserError, match=f"{part} is {dtypes[part]}, where MXFP4 has uint8"):
        decoded({n: Tensor(n, shape) for n, shape in shapes.items()}, {}, dtypes=dtypes)
    int4 = {"w_packed": Tensor("w_packed", (6, 8)), "w_scale": Tensor("w_scale", (6, 2))}
    if narrow(DTYPES[code]) != np.int32:
        with pytest.raises(UserError, match="w_packed is .*, where int4 has int32"):
            decoded(int4, {}, dtypes={"w_packed": narrow(DTYPES[code])})
