"""The layout of an OCDBT database: data files with the values and the nodes of its B+tree."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import google_crc32c
import tensorstore as ts
from etils import epath

from maxconv.private.tensorstore import MAGIC, PAGE, parse_location
from maxconv.sources.orbax import open_store

Spans = Mapping[str, set[tuple[int, int]]]  # by file: byte ranges of values


def values(directory: epath.PathLike) -> Iterator[tuple[str, str, int, int]]:
    """The values that a database's tree points to: key, file, start and end offset in the file.

    Small values, which are stored in the nodes themselves, are not included.

    Raises:
        ValueError: there is no tree.
    """
    store = open_store(epath.Path(directory))
    (version,) = ts.ocdbt.dump(store).result()["versions"][-1:]
    nodes = [("", version["root"]["location"])]
    while nodes:
        prefix, node = nodes.pop()
        for entry in ts.ocdbt.dump(store, node).result()["entries"]:
            if "location" in entry:
                common = prefix + entry["subtree_common_prefix"].decode()
                nodes.append((common, entry["location"]))
            elif "indirect_value" in entry:
                file, start, length = parse_location(entry["indirect_value"])
                yield prefix + entry["key"].decode(), file, start, start + length


def value_spans(directory: epath.PathLike) -> Spans:
    """The byte ranges of these values in each of a database's data files."""
    spans: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    for _, file, start, stop in values(directory):
        spans[file].add((start, stop))
    return spans


def unexplained(file: epath.Path, values: Sequence[tuple[int, int]]) -> Iterator[str]:
    """A phrase for each byte range that is neither a value nor an intact node nor padding."""
    size, start = file.stat().length, 0
    with file.open("rb") as data:
        for begin, end in [*values, (size, size)]:
            while start < begin:
                data.seek(start)
                header = data.read(12)
                length = int.from_bytes(header[4:], "little")
                if header[:4] not in MAGIC or not 16 <= length <= begin - start:
                    padding = begin == size and begin - start < PAGE
                    if not padding or any(header + data.read()):
                        yield f"bytes {start} to {begin} belong to no value or node"
                    break
                node = header + data.read(length - 12)
                if google_crc32c.value(node[:-4]) != int.from_bytes(node[-4:], "little"):
                    yield f"the node at bytes {start} to {start + length} has a wrong CRC"
                start += length
            start = max(start, end)
