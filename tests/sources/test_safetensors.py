import json
import struct
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save

from maxconv.errors import UserError
from maxconv.sources.safetensors import (
    DTYPES,
    MAX_JSON,
    header_length,
    load_object,
    parse_header,
    some,
)


def entry(dtype: str = "U8", shape: list | None = None, begin: int = 0, end: int = 4) -> dict:
    return {"dtype": dtype, "shape": [4] if shape is None else shape, "data_offsets": [begin, end]}


def file_of(header: object, data: int) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def parse(raw: bytes):
    return parse_header(raw[: 8 + header_length(raw, len(raw))], "f", len(raw))


def problems(raw: bytes) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        parse(raw)
    return caught.value.problems


def refused_by_reference(raw: bytes) -> bool:
    try:
        safetensors.deserialize(raw)
    except safetensors.SafetensorError:
        return True
    return False


def test_reads_what_the_reference_writes():
    arrays = {
        "scalar": np.array(3, np.int32),
        "empty": np.zeros((2, 0, 3), np.float16),
        "matrix": np.arange(6, dtype=np.float64).reshape(2, 3),
    }
    raw = save(arrays, metadata={"format": "pt"})
    infos = {info.name: info for info in parse(raw)}
    assert infos.keys() == arrays.keys()
    for name, array in arrays.items():
        info = infos[name]
        assert (info.dtype, info.shape, info.file) == (array.dtype, array.shape, "f")
        assert (info.size, info.nbytes) == (array.size, array.nbytes)
        assert raw[info.offset : info.offset + info.nbytes] == array.tobytes()


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_as_wide_as_in_the_reference(code):
    dtype = DTYPES[code]
    raw = file_of({"a": entry(code, [3], 0, 3 * dtype.itemsize)}, 3 * dtype.itemsize)
    assert not refused_by_reference(raw)
    assert parse(raw)[0].dtype == dtype


def test_bfloat16_and_float8():
    assert DTYPES["BF16"] == ml_dtypes.bfloat16
    assert DTYPES["F8_E4M3"] == ml_dtypes.float8_e4m3fn  # the variant without infinities


def test_no_tensors():
    assert parse(file_of({}, 0)) == ()
    assert parse(file_of({"__metadata__": {"format": "pt"}}, 0)) == ()


def test_adjacent_empty_tensors():
    header = {"a": entry(shape=[0], end=0), "b": entry(), "c": entry(shape=[0], begin=4)}
    assert [info.offset for info in parse(file_of(header, 4))] == [
        offset + len(file_of(header, 0)) for offset in (0, 0, 4)
    ]


@pytest.mark.parametrize(
    "header, data, sentence",
    [
        (
            {"a": entry(begin=2, end=6)},
            6,
            "f has 2 bytes before tensor 'a' that belong to no tensor; download it again.",
        ),
        (
            {"a": entry(), "b": entry(begin=2, end=6)},
            6,
            "Tensors 'a' and 'b' of f overlap; download it again.",
        ),
        (
            {"a": entry(shape=[5])},
            4,
            "Tensor 'a' of f has 4 bytes, but U8[5] needs 5; download the file again.",
        ),
        (
            {"a": entry()},
            3,
            "f is truncated: its header describes 72 bytes, the file has 71; download it again.",
        ),
        (
            {"a": entry()},
            6,
            "f has 74 bytes, 2 more than its header describes; download it again.",
        ),
    ],
)
def test_layout_is_judged_as_by_the_reference(header, data, sentence):
    raw = file_of(header, data)
    assert problems(raw) == (sentence,)
    assert refused_by_reference(raw)


@pytest.mark.parametrize(
    "broken",
    [
        3,
        {},
        {"dtype": "U8", "shape": [4]},
        entry(shape=[-4]),
        entry(shape=[4.0]),
        entry(shape=[True], end=1),
        entry(begin=-1),
        entry(begin=4, end=0),
        {**entry(), "shape": 4},
        {**entry(), "dtype": 8},
        {**entry(), "data_offsets": [0, 4, 8]},
    ],
)
def test_broken_entry(broken):
    assert problems(file_of({"a": broken}, 4)) == (
        "Tensor 'a' of f has no valid dtype, shape and data_offsets; download the file again.",
    )


def test_unknown_dtypes_are_told_once_each():
    header = {f"t{i}": entry("F4", [8], 4 * i, 4 * i + 4) for i in range(5)}
    (sentence,) = problems(file_of(header, 20))
    assert sentence.startswith(
        "f holds F4 tensors ('t0', 't1', 't2' and 2 more), a dtype that cannot be read; use a "
        "checkpoint in one of BOOL, U8,"
    )


def test_names_that_come_twice():
    text = json.dumps({"a": entry(), "b": entry(begin=4, end=8)}).replace('"b"', '"a"')
    assert "The header of f has 'a' more than once; download it again." in problems(
        file_of(text.encode(), 8)
    )


def test_all_problems_at_once():
    header = {"a": entry("F4"), "b": entry(shape=[3], begin=5, end=9), "c": entry(begin=8, end=12)}
    found = problems(file_of(header, 11))
    for part in ("F4", "U8[3] needs 3", "1 bytes before", "overlap", "truncated"):
        assert any(part in sentence for sentence in found)
    assert len(found) == 5


@pytest.mark.parametrize(
    "raw, sentence",
    [
        (b"", "f has 0 bytes, too few for a safetensors file; download it again."),
        (b"1234567", "f has 7 bytes, too few for a safetensors file; download it again."),
        (
            b"<!DOCTYPE html>",
            "f is not a safetensors file (its first 8 bytes would mean a header of "
            "5789751444030890300 bytes); download it again.",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            "f is a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned, "
            "or download it again with `hf download`.",
        ),
        (
            struct.pack("<Q", 100) + bytes(50),
            "f is truncated: its header alone takes 108 bytes, the file has 58; download it again.",
        ),
        (file_of([], 0), "The header of f is not a JSON object; download it again."),
    ],
)
def test_no_header(raw, sentence):
    assert problems(raw) == (sentence,)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff{}", b"[" * 100_000, b"{'a': 1}"])
def test_header_that_is_not_json(text):
    (sentence,) = problems(file_of(text, 0))
    assert sentence.startswith("The header of f is not valid JSON (")
    assert sentence.endswith("; download it again.")


def test_duplicate_names_take_no_longer_than_others():
    """A megabyte of them took minutes when each was compared with all."""
    text = b'{"b": 1, ' + b",".join(b'"%d": 1' % (i // 2) for i in range(100_000)) + b"}"
    found: list[str] = []
    began = time.process_time()
    load_object(text, "f", found)
    assert time.process_time() - began < 5
    assert found == ["f has '0', '1', '2' and 49997 more more than once; download it again."]


def test_json_that_would_fill_the_memory_is_not_parsed():
    for text in (b"[" + b"{}," * 6_000_000 + b"1]", b"[" * 20_000_000, b"1," * 20_000_000):
        with pytest.raises(UserError, match="f has more than 10,000,000 values"):
            load_object(text, "f", [])


@pytest.mark.parametrize(
    "shape",
    [[1 << 63], [10**4000], [1] * 65, [1e999], [float("nan")], [1 << 62] * 64],
)
def test_absurd_shapes_are_told_in_a_sentence(shape):
    text = json.dumps({"a": {"dtype": "U8", "shape": shape, "data_offsets": [0, 4]}})
    (sentence,) = problems(file_of(text.encode(), 4))
    assert "has no valid dtype, shape" in sentence or "has 4 bytes, but U8" in sentence


def test_integers_that_python_does_not_parse_are_told():
    (sentence,) = problems(file_of(b'{"a": %s}' % (b"9" * 5000), 4))
    assert sentence.startswith("The header of f is not valid JSON (Exceeds the limit")


def test_header_over_the_limit_is_not_read():
    assert header_length(struct.pack("<Q", MAX_JSON), 1 << 40) == MAX_JSON
    raw = struct.pack("<Q", MAX_JSON + 1)
    assert header_length(raw, 1 << 40) == 0
    with pytest.raises(UserError, match="would mean a header of 100000001 bytes"):
        parse_header(raw, "f", 1 << 40)


def test_some():
    assert some(["a"]) == "'a'"
    assert some("abc") == "'a', 'b', 'c'"
    assert some("abcde") == "'a', 'b', 'c' and 2 more"
