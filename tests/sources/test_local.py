import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from maxconv.algebra.boxes import Box, dims, intersect
from maxconv.algebra.storage import blocks, coalesce, runs
from maxconv.errors import UserError
from maxconv.sources import LocalSource, Part, aligned_empty, open_source
from maxconv.sources.index import INDEX, SINGLE
from maxconv.sources.local import SAMPLE, SAMPLES, sample_spans

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.arange(4, dtype=np.int16)


def write(directory: Path, **files: dict[str, np.ndarray]) -> Path:
    """A checkpoint; the keywords are file names without .safetensors."""
    (directory / "config.json").write_text('{"model_type": "tiny"}')
    for name, arrays in files.items():
        save_file(arrays, directory / f"{name}.safetensors")
    return directory


def write_index(directory: Path, **weight_map: str) -> Path:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


def problems(directory: Path) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        LocalSource(directory)
    return caught.value.problems


def whole(array: np.ndarray) -> Box:
    return tuple((0, n) for n in array.shape)


def read_whole(source: LocalSource, name: str) -> np.ndarray:
    info = source.tensors[name]
    array = aligned_empty(info.shape, info.dtype)
    source.read(info, [(tuple((0, n) for n in info.shape), array)])
    return array


@contextmanager
def opened(array: np.ndarray, block: int = 4 << 20) -> Iterator[LocalSource]:
    with tempfile.TemporaryDirectory() as directory:
        with LocalSource(write(Path(directory), model={"x": array, "pad": B})) as source:
            source.block = block
            yield source


def index(box: Box) -> tuple[slice, ...]:
    return tuple(slice(*interval) for interval in box)


# ---- planning


@st.composite
def boxes(draw, shape: tuple[int, ...]) -> Box:
    ends = [sorted(draw(st.tuples(*[st.integers(0, n)] * 2))) for n in shape]
    return tuple((start, stop) for start, stop in ends)


shapes = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@given(st.data(), shapes, st.sampled_from([1, 2, 4, 8]))
def test_runs_are_the_bytes_of_the_box(data, shape, itemsize):
    box = data.draw(boxes(shape))
    items = np.arange(math.prod(shape)).reshape(shape)[index(box)].reshape(-1)
    offsets, nbytes = runs(shape, box, itemsize)
    found = [byte for offset in offsets for byte in range(offset, offset + nbytes)]
    assert found == [byte for i in items for byte in range(i * itemsize, (i + 1) * itemsize)]
    assert all(offsets[1:] > offsets[:-1] + nbytes)  # otherwise they would be one run


def test_runs_examples():
    assert [x.tolist() for x in map(np.asarray, runs((), (), 4))] == [[0], 4]
    assert [x.tolist() for x in map(np.asarray, runs((4, 6), ((1, 3), (0, 6)), 2))] == [[12], 24]
    assert [x.tolist() for x in map(np.asarray, runs((4, 6), ((1, 3), (2, 4)), 2))] == [[16, 28], 4]


def test_coalesce_joins_grids():
    grid = [((i, i + 2), (j, j + 3)) for j in (3, 0, 6) for i in (2, 0)]
    assert coalesce(grid) == [((0, 4), (0, 9))]
    assert coalesce(grid[:2]) == [((0, 4), (3, 6))]
    assert coalesce([((0, 2), (0, 1)), ((0, 2), (2, 3))]) == [((0, 2), (0, 1)), ((0, 2), (2, 3))]
    assert coalesce([()]) == [()]
    assert coalesce([]) == []


@given(st.data(), shapes, st.sampled_from([1, 2, 8]), st.integers(1, 64))
def test_blocks_tile_the_box_in_order(data, shape, itemsize, limit):
    box = data.draw(boxes(shape))
    items = np.arange(math.prod(shape)).reshape(shape)
    split = list(blocks(box, itemsize, limit))
    found = np.concatenate([items[index(part)].reshape(-1) for part in split])
    np.testing.assert_array_equal(found, items[index(box)].reshape(-1))
    assert all(math.prod(dims(part)) * itemsize <= max(limit, itemsize) for part in split)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 5), (1 << 20,)])
def test_aligned_empty(shape, zero):
    array = aligned_empty(shape, ml_dtypes.bfloat16, zero)
    assert (array.shape, array.dtype) == (shape, ml_dtypes.bfloat16)
    assert array.flags.c_contiguous and array.flags.writeable
    assert array.ctypes.data % 64 == 0 or not array.size
    assert not (zero and array.any())


# ---- reading


@st.composite
def partitions(draw, box: Box) -> list[Box]:
    """Disjoint boxes in `box`: guillotine cuts, some pieces left out."""
    wide = [axis for axis, (start, stop) in enumerate(box) if stop - start > 1]
    if not wide or draw(st.integers(0, 3)) == 0:
        return [] if draw(st.integers(0, 4)) == 0 else [box]
    axis = draw(st.sampled_from(wide))
    start, stop = box[axis]
    cut = draw(st.integers(start + 1, stop - 1))
    halves = [(*box[:axis], half, *box[axis + 1 :]) for half in ((start, cut), (cut, stop))]
    return [part for half in halves for part in draw(partitions(half))]


def empty(shape: tuple[int, ...], dtype: np.dtype, layout: str) -> np.ndarray:
    if layout == "transposed":
        return np.empty(shape[::-1], dtype).T
    if layout == "strided":
        return np.empty([2 * n for n in shape], dtype)[(..., *[slice(None, None, 2)] * len(shape))]
    return np.empty(shape, dtype)


DTYPES = [np.dtype(name) for name in ("bool", "i1", "float8_e4m3fn", "f2", "bfloat16", "f4", "c8")]


@settings(max_examples=200, deadline=None)
@given(st.data(), shapes, st.sampled_from(DTYPES), st.sampled_from([1, 16, 40, 4 << 20]))
def test_parts_equal_slices_and_no_other_byte_is_read(data, shape, dtype, block):
    array = np.random.default_rng(0).integers(0, 2, (*shape, dtype.itemsize), np.uint8)
    array = array.view(dtype).reshape(shape)
    targets = data.draw(st.permutations(data.draw(partitions(whole(array)))))
    layouts = st.sampled_from(["contiguous", "transposed", "strided"])
    parts: list[Part] = [(box, empty(dims(box), dtype, data.draw(layouts))) for box in targets]
    with opened(array, block) as source, count_bytes(source) as counts:
        source.read(source.tensors["x"], parts)
        for box, part in parts:
            assert part.tobytes() == array[index(box)].tobytes()
        needed = np.zeros(array.nbytes, int)
        for box in targets:
            offsets, nbytes = runs(shape, box, dtype.itemsize)
            for offset in offsets:
                needed[offset : offset + nbytes] += 1
        np.testing.assert_array_equal(counts, needed)
        assert source.stats.bytes_read == sum(part.nbytes for _, part in parts)


@contextmanager
def count_bytes(source: LocalSource) -> Iterator[np.ndarray]:
    """How often preadv brought each byte of tensor x."""
    info = source.stored["x"]
    counts = np.zeros(info.nbytes, int)
    preadv = os.preadv

    def counting(file, buffers, offset):
        count = preadv(file, buffers, offset)
        counts[offset - info.offset : offset - info.offset + count] += 1
        assert 0 <= offset - info.offset <= info.nbytes - count
        return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", counting)
        yield counts


def test_column_shards_are_read_in_row_blocks():
    array = np.arange(64 * 32, dtype=np.int16).reshape(64, 32)
    parts: list[Part] = [
        (((0, 64), (j, j + 4)), np.empty((64, 4), np.int16)) for j in range(0, 32, 4)
    ]
    with opened(array, block=1024) as source:
        source.read(source.tensors["x"], parts)
        assert (source.stats.bytes_read, source.stats.requests) == (4096, 4)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts], 1), array)


def test_large_row_shards_are_read_in_place_and_small_ones_together():
    array = np.arange(64 * 32, dtype=np.int16).reshape(64, 32)
    parts: list[Part] = [
        (((i, i + 16), (0, 32)), np.empty((16, 32), np.int16)) for i in range(0, 64, 16)
    ]
    for block, requests in (1024, 4), (8192, 1):
        with opened(array, block) as source:
            source.read(source.tensors["x"], parts)
            assert source.stats.requests == requests
        np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), array)


def test_one_column_shard_of_several_is_read_run_by_run():
    array = np.arange(64 * 32, dtype=np.int16).reshape(64, 32)
    parts: list[Part] = [(((0, 64), (j, j + 4)), np.empty((64, 4), np.int16)) for j in (8, 12, 24)]
    with opened(array) as source:
        source.read(source.tensors["x"], parts)
        assert (source.stats.bytes_read, source.stats.requests) == (64 * 3 * 8, 64 * 2)
    for box, part in parts:
        np.testing.assert_array_equal(part, array[index(box)])


def test_views_of_the_same_width_are_filled():
    array = np.arange(6, dtype=np.float32).astype(ml_dtypes.bfloat16)
    target = np.empty(6, np.uint16)
    with opened(array) as source:
        source.read(source.tensors["x"], [(whole(array), target)])
    assert target.tobytes() == array.tobytes()


@pytest.mark.parametrize("wrong", [np.empty((3, 2), np.float32), np.empty((2, 3), np.float64)])
def test_array_that_does_not_fit(wrong):
    with opened(A) as source, pytest.raises(ValueError, match="does not fit box"):
        source.read(source.tensors["x"], [(whole(A), wrong)])


def test_short_reads_are_continued(monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][:7]], at))
    with opened(A) as source:
        assert read_whole(source, "x").tobytes() == A.tobytes()


def test_file_truncated_while_it_is_read(tmp_path):
    with LocalSource(write(tmp_path, model={"a": A})) as source:
        os.truncate(tmp_path / SINGLE, source.stored["a"].offset + 5)
        with pytest.raises(OSError, match=r"model\.safetensors in .* was truncated .*tensor 'a'"):
            read_whole(source, "a")


def test_file_gone_while_it_is_read(tmp_path):
    source = LocalSource(write(tmp_path, model={"a": A}))
    (tmp_path / SINGLE).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        read_whole(source, "a")
    assert "while reading tensor 'a' from model.safetensors" in caught.value.__notes__[0]


def test_threads():
    array = np.random.default_rng(0).integers(0, 99, (64, 32), np.int32)
    with opened(array, block=512) as source, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: read_whole(source, "x"), range(200)))
        assert source.stats.bytes_read == 200 * array.nbytes
        assert source.stats.requests == 200
        assert len(source._files) == 1
    assert all((result == array).all() for result in results)


def test_files_are_opened_by_the_first_read_and_closed(tmp_path):
    count = len(os.listdir("/proc/self/fd"))
    with LocalSource(write(tmp_path, model={"a": A})) as source:
        assert len(os.listdir("/proc/self/fd")) == count
        read_whole(source, "a")
        assert len(os.listdir("/proc/self/fd")) == count + 1
    assert len(os.listdir("/proc/self/fd")) == count
    assert read_whole(source, "a").tobytes() == A.tobytes()
    source.close()


# ---- directories


def test_single_file(tmp_path):
    source = LocalSource(write(tmp_path, model={"a": A, "b": B}))
    assert source.root == str(tmp_path)
    assert source.config == {"model_type": "tiny"}
    assert source.revision is None
    assert source.notices == []
    assert set(source.tensors) == {"a", "b"}
    assert source.stats.bytes_read == 0


def test_index(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, **{"one": {"a": A}, "sub/two": {"b": B}})
    write_index(tmp_path, a="one.safetensors", b="sub/two.safetensors")
    with LocalSource(tmp_path) as source:
        assert source.stored["b"].file == "sub/two.safetensors"
        assert read_whole(source, "a").tobytes() == A.tobytes()
        assert read_whole(source, "b").tobytes() == B.tobytes()


def test_all_files_without_an_index(tmp_path):
    source = LocalSource(write(tmp_path, one={"a": A}, two={"b": B}))
    assert {info.file for info in source.stored.values()} == {"one.safetensors", "two.safetensors"}


def test_snapshot_in_the_hub_cache(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / commit
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    write(blobs, one={"a": A})
    for name in "config.json", "one.safetensors":
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    with LocalSource(write_index(snapshot, a="one.safetensors")) as source:
        assert source.revision == commit
        assert read_whole(source, "a").tobytes() == A.tobytes()


def test_what_is_left_out_is_noticed(tmp_path):
    write(tmp_path, one={"a": A, "b": B}, two={"a": A, "c": B}, consolidated={"z": B})
    source = LocalSource(write_index(tmp_path, a="one.safetensors", c="two.safetensors"))
    assert set(source.tensors) == {"a", "c"}
    assert source.stored["a"].file == "one.safetensors"
    assert source.notices == [
        f"2 tensors are not read, because {INDEX} does not list them in the files "
        "that hold them: 'b', 'a'.",
        f"{tmp_path} has {INDEX}, so 'consolidated.safetensors' is not read.",
    ]


def test_files_beside_the_single_one_are_noticed(tmp_path):
    source = LocalSource(write(tmp_path, model={"a": A}, adapter={"z": B}))
    assert source.notices == [f"{tmp_path} has {SINGLE}, so 'adapter.safetensors' is not read."]


# ---- bad input


def test_missing_directory(tmp_path):
    assert problems(tmp_path / "no") == (
        f"{tmp_path}/no does not exist; check the path, or download it first.",
    )


def test_a_file_is_given(tmp_path):
    path = write(tmp_path, model={"a": A}) / SINGLE
    assert problems(path) == (f"{path} is a file; give the directory that holds it.",)


def test_empty_directory(tmp_path):
    assert problems(tmp_path) == (
        f"config.json in {tmp_path} does not exist; check the path, or download it first.",
        f"{tmp_path} has no .safetensors files; give the directory of a checkpoint.",
    )


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.gguf"])
def test_other_formats(tmp_path, name):
    (write(tmp_path) / name).touch()
    assert problems(tmp_path) == (
        f"{tmp_path} has no .safetensors files, but '{name}'; convert them to safetensors first, "
        "or download a revision that has them.",
    )


def test_orbax_checkpoint(tmp_path):
    (write(tmp_path) / "_CHECKPOINT_METADATA").touch()
    assert problems(tmp_path) == (
        f"{tmp_path} is an Orbax checkpoint, the output of a conversion; give the Hugging Face "
        "checkpoint to convert.",
    )


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("[]", "config.json is not a JSON object; download it again."),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "config.json is a Git LFS pointer, not the file itself; run `git lfs pull` where it "
            "was cloned, or download it again with `hf download`.",
        ),
    ],
)
def test_broken_config(tmp_path, text, sentence):
    (write(tmp_path, model={"a": A}) / "config.json").write_text(text)
    assert problems(tmp_path) == (sentence,)


def test_entries_that_come_twice(tmp_path):
    config = write(tmp_path, model={"a": A}) / "config.json"
    config.write_text('{"a": 1, "b": 2, "a": 1, "c": {"b": 3, "b": 2}}')
    source = LocalSource(tmp_path)
    assert source.contradictory == ["b"]
    assert source.notices == ["config.json has 'b' more than once; the last counts."]


def test_transformers_reads_a_single_file_before_an_index(tmp_path):
    write_index(write(tmp_path, model={"a": A}), b="model-00001-of-00002.safetensors")
    assert set(LocalSource(tmp_path).tensors) == {"a"}


def test_config_names_its_files(tmp_path):
    write(tmp_path, model={"a": A}, ours={"b": B}, one={"c": B})
    config, index = tmp_path / "config.json", "other.safetensors.index.json"
    (tmp_path / index).write_text('{"weight_map": {"c": "one.safetensors"}}')
    for stated, name in (("ours.safetensors", "b"), (index, "c")):
        config.write_text(json.dumps({"transformers_weights": stated}))
        source = LocalSource(tmp_path)
        assert set(source.tensors) == {name}
        (notice,) = source.notices
        assert f"transformers_weights={stated} in config.json" in notice
    for stated in ("gone.safetensors", "config.json", "../ours.safetensors"):
        config.write_text(json.dumps({"transformers_weights": stated}))
        (sentence,) = problems(tmp_path)
        assert f"transformers_weights={stated} in config.json, but no such" in sentence


def test_adapters_and_models_in_one_directory(tmp_path):
    write(tmp_path, adapter_model={"z": A}, one={"a": A}, two={"b": B})
    (tmp_path / "adapter_config.json").write_text("{}")
    assert set(LocalSource(tmp_path).tensors) == {"a", "b"}
    write(tmp_path, model={"c": A})
    assert set(LocalSource(tmp_path).tensors) == {"c"}
    assert set(LocalSource(tmp_path, "adapter_config.json").tensors) == {"z"}


def test_broken_index(tmp_path):
    (write(tmp_path, one={"a": A}) / INDEX).write_text("{")
    (sentence,) = problems(tmp_path)
    assert sentence.startswith(f"{INDEX} is not valid JSON (Expecting property name")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": [1]}'])
def test_index_without_a_weight_map(tmp_path, text):
    (write(tmp_path, one={"a": A}) / INDEX).write_text(text)
    assert problems(tmp_path) == (f"{INDEX} has no weight_map; download it again.",)


@pytest.mark.parametrize("name", ["/etc/passwd", "../one.safetensors", "a/../../b"])
def test_index_that_leads_out_of_the_directory(tmp_path, name):
    write_index(write(tmp_path, one={"a": A}), a="one.safetensors", b=name)
    assert problems(tmp_path) == (
        f"{INDEX} names '{name}'; it may only name files in its own directory.",
    )


@pytest.mark.parametrize("name", [3, None, [], {"a": 1}, ["a.safetensors"]])
def test_index_without_a_file_for_a_tensor(tmp_path, name):
    write_index(write(tmp_path, one={"a": A}), a="one.safetensors", b=name)
    assert problems(tmp_path) == (f"{INDEX} has no file name for 'b'; download it again.",)


def test_index_names_a_file_that_is_missing(tmp_path):
    write_index(write(tmp_path, one={"a": A}), a="one.safetensors", b="two.safetensors")
    assert problems(tmp_path) == (
        f"{INDEX} in {tmp_path} lists tensors in 'two.safetensors', not there: download the "
        f"missing files, or remove {INDEX} if the other files hold all tensors.",
    )


def test_index_disagrees_with_the_files(tmp_path):
    write(tmp_path, one={"a": A}, two={"b": B})
    write_index(tmp_path, a="two.safetensors", b="two.safetensors", c="one.safetensors")
    assert problems(tmp_path) == (
        f"{INDEX} lists 'a' in two.safetensors, which does not hold them ('one.safetensors' does); "
        "download both again.",
        f"{INDEX} lists 'c' in one.safetensors, which does not hold them; download both again.",
    )


def test_same_tensor_in_two_files(tmp_path):
    write(tmp_path, one={"a": A, "b": B}, two={"b": B, "a": A}, three={"a": A})
    assert problems(tmp_path) == (
        f"one.safetensors and three.safetensors both hold 'a'; delete one of the files, or add a "
        f"{INDEX} that selects one.",
        f"one.safetensors and two.safetensors both hold 'a', 'b'; delete one of the files, or add "
        f"a {INDEX} that selects one.",
    )


def test_unfinished_downloads(tmp_path):
    cache = write(tmp_path, model={"a": A}) / ".cache/huggingface/download"
    cache.mkdir(parents=True)
    (cache / "x.incomplete").touch()
    assert problems(tmp_path) == (
        f"{tmp_path} holds unfinished downloads ('x.incomplete'); run `hf download` "
        "again, or delete them.",
    )


def test_all_problems_of_all_files_at_once(tmp_path):
    write(tmp_path, one={"a": A}, two={"b": B})
    os.truncate(tmp_path / "one.safetensors", 90)
    (tmp_path / "two.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "three.safetensors").symlink_to("gone")
    (tmp_path / "four.safetensors").mkdir()
    (tmp_path / "config.json").unlink()
    found = problems(tmp_path)
    assert len(found) == 5
    assert (
        found[0]
        == f"config.json in {tmp_path} does not exist; check the path, or download it first."
    )
    assert found[1] == f"four.safetensors in {tmp_path} cannot be read: it is a directory."
    assert found[2].startswith("one.safetensors is truncated: its header describes ")
    assert (
        found[3]
        == f"three.safetensors in {tmp_path} does not exist; check the path, or download it first."
    )
    assert found[4].startswith("two.safetensors is a Git LFS pointer")


SPECIAL = ("config.json", INDEX, "one.safetensors")


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "directory"])
def test_only_regular_files_are_read(tmp_path, name, kind):
    """Others may never end, or never begin."""
    write_index(write(tmp_path, one={"a": A}), a="one.safetensors")
    path = tmp_path / name
    path.unlink()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "socket":
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(os.path.relpath(path))
        case "directory":
            path.mkdir()
    what = {"directory": "it is a directory", "socket": "No such device or address"}
    why = what.get(kind, "it is not a regular file")
    assert problems(tmp_path)[0] == f"{name} in {tmp_path} cannot be read: {why}."


def test_a_file_that_becomes_a_pipe_is_not_read(tmp_path):
    with LocalSource(write(tmp_path, model={"a": A})) as source:
        (tmp_path / SINGLE).unlink()
        os.mkfifo(tmp_path / SINGLE)
        with pytest.raises(OSError, match="it is not a regular file"):
            read_whole(source, "a")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_files_without_tensors_have_a_size_that_is_read(tmp_path, name):
    path = write_index(write(tmp_path, one={"a": A}), a="one.safetensors") / name
    os.truncate(path, 1 << 40)
    assert problems(tmp_path)[0] == (
        f"{name} in {tmp_path} has 1,099,511,627,776 bytes, more than the limit of "
        "100,000,000 for a JSON file; download it again."
    )


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 5000])
def test_names_that_no_file_can_have(tmp_path, name):
    write_index(write(tmp_path, one={"a": A}), a="one.safetensors", b=name)
    (sentence,) = problems(tmp_path)
    assert sentence.startswith(f"{INDEX} in {tmp_path} lists tensors in {name!r}, not there: ")


# ---- what tells copies apart


def test_fingerprints_are_of_content_alone(tmp_path):
    """Not of places or times."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        write_index(write(tmp_path / name, m={"a": A}, n={"b": B}), a="m.safetensors")
        os.utime(tmp_path / name / "m.safetensors", (0, len(name)))
    with LocalSource(tmp_path / "one") as one, LocalSource(tmp_path / "other") as other:
        assert one.versions() != other.versions()
        found = one.fingerprints()
        assert found == other.fingerprints()
        assert found.keys() == {"config.json", INDEX, "m.safetensors"}
        assert one.stats.bytes_read == 0


@pytest.mark.parametrize("nbytes", [1, 1000, SAMPLE * SAMPLES, 8 << 20])
def test_fingerprints_tell_weights_apart(tmp_path, nbytes):
    random, found = np.random.default_rng(0), []
    for _ in range(2):  # of the same names and shapes
        write(tmp_path, model={"a": random.integers(0, 256, nbytes, np.uint8)})
        with LocalSource(tmp_path) as source:
            found.append(dict(source.fingerprints()))
    assert [name for name in found[0] if found[0][name] != found[1][name]] == [SINGLE]


def test_any_byte_of_a_small_file_tells_and_of_a_large_one_any_eighth(tmp_path):
    raw = np.zeros(SAMPLES * SAMPLE - 200, np.uint8)
    with LocalSource(write(tmp_path, model={"a": raw})) as source:
        before, at = source.fingerprints(), source.stored["a"].offset
        for i in random_places(raw.size, 50):
            with (tmp_path / SINGLE).open("r+b") as file:
                file.seek(at + i)
                file.write(b"x")
            assert source.fingerprints() != before
            before = source.fingerprints()
    for size in (1, 7, SAMPLE, 10**6, 10**12 + 1):
        spans = list(sample_spans(size))
        parts = [i * size // SAMPLES for i in range(SAMPLES + 1)]
        assert all(
            first <= start <= stop <= last and stop - start == min(SAMPLE, last - first)
            for (start, stop), first, last in zip(spans, parts[:-1], parts[1:], strict=True)
        )
        assert spans == list(sample_spans(size))


def random_places(size, n):
    return np.random.default_rng(1).integers(0, size, n).tolist()


@contextmanager
def not_root() -> Iterator[None]:
    """Root reads everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_files_that_may_not_be_read():
    with tempfile.TemporaryDirectory() as name:  # tmp_path lies in a directory of root's own
        directory = write(Path(name), model={"a": A})
        directory.chmod(0o755)
        (directory / SINGLE).chmod(0)
        with not_root():
            assert problems(directory) == (
                f"{SINGLE} in {directory} is not readable by this user; change its permissions.",
            )
        directory.chmod(0)
        with not_root():
            assert problems(directory) == (
                f"{directory} is not readable by this user; change its permissions.",
            )
        directory.chmod(0o755)


# ---- open_source


def test_open_source_directory(tmp_path, monkeypatch):
    (tmp_path / "org/name").mkdir(parents=True)
    write(tmp_path / "org/name", model={"a": A})
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_source("org/name"), LocalSource)
    noticed = open_source("org/name", revision="main").notices
    assert list(noticed) == ["org/name is a directory: revision main is ignored"]


def test_open_source_missing(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(str(tmp_path / "no"))


def test_intersect():
    assert intersect(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert intersect(((0, 4),), ((4, 5),)) is None
    assert intersect((), ()) == ()
