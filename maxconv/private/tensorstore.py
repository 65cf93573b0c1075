"""The format of TensorStore's OCDBT files, which is documented but has no API to read it.

https://google.github.io/tensorstore/kvstore/ocdbt describes it, except for padding and locations.
"""

import re

# The magic numbers of the three kinds of nodes: manifest, B+tree node, version tree node.
MAGIC = {bytes.fromhex(magic) for magic in ("0cdb3a2a", "0cdb20de", "0cdb1234")}
PAGE = 4096  # bytes: the last page of a large file is padded with zeros


def parse_location(location: str) -> tuple[str, int, int]:
    """Parses `value:<base>:<file>:<offset>:<length>` of `ts.ocdbt.dump`: file, offset, length."""
    match = re.fullmatch(r"\w+:(.*):(\d+):(\d+)", location)
    assert match is not None, location
    return match[1].replace(":", ""), int(match[2]), int(match[3])
