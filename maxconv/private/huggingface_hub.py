"""Private parts of huggingface_hub's `CommitOperationAdd`; there is no public API for these."""

from huggingface_hub import CommitOperationAdd


def nbytes(addition: CommitOperationAdd) -> int:
    """The size of a file that is to be committed, uploaded or not."""
    return addition.upload_info.size


def is_uploaded(addition: CommitOperationAdd) -> bool:
    """Whether `preupload_lfs_files` uploaded a file: it then drops the contents."""
    return addition.path_or_fileobj == b""
