"""Private parts of huggingface_hub's `CommitOperationAdd`; there is no public API for these."""

from typing import NamedTuple

from huggingface_hub import CommitOperationAdd
from huggingface_hub.lfs import UploadInfo


def nbytes(addition: CommitOperationAdd) -> int:
    """The size of a file that is to be committed, uploaded or not."""
    return addition.upload_info.size


def is_uploaded(addition: CommitOperationAdd) -> bool:
    """Whether `preupload_lfs_files` uploaded a file: it then drops the contents."""
    return addition.path_or_fileobj == b""


class Uploaded(NamedTuple):
    """A large file that is uploaded, as it is told to another process that commits it."""

    path: str
    sha256: str
    nbytes: int


def described(addition: CommitOperationAdd) -> Uploaded:
    """A file that `preupload_lfs_files` uploaded."""
    about = addition.upload_info
    return Uploaded(addition.path_in_repo, about.sha256.hex(), about.size)


def uploaded(file: Uploaded) -> CommitOperationAdd:
    """A file that another process uploaded."""
    addition = CommitOperationAdd(file.path, b"")
    digest = bytes.fromhex(file.sha256)
    addition.upload_info = UploadInfo(sha256=digest, size=file.nbytes, sample=b"")
    addition._upload_mode, addition._is_uploaded = "lfs", True
    return addition
