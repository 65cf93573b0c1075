"""The format of TensorStore's OCDBT files, which it documents but reads for no caller.

https://google.github.io/tensorstore/kvstore/ocdbt describes it, padding and locations apart.
"""

import re

# How the three kinds of nodes begin: manifest, B+tree node, version tree node.
MAGIC = {bytes.fromhex(magic) for magic in ("0cdb3a2a", "0cdb20de", "0cdb1234")}
PAGE = 4096  # bytes: the last page of a large file is filled up with zeros


def parse_location(location: str) -> tuple[str, int, int]:
    """File, offset and length of `value:<base>:<file>:<offset>:<length>` in `ts.ocdbt.dump`."""
    match = re.fullmatch(r"\w+:(.*):(\d+):(\d+)", location)
    assert match is not None, location
    return match[1].replace(":", ""), int(match[2]), int(match[3])
