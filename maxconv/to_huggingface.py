"""`python -m maxconv.to_huggingface`: a drop-in for MaxText's checkpoint_conversion.to_huggingface.

It takes the same arguments, for a model, an adapter or both; the dtype of each tensor is the
published one unless weight_dtype says otherwise. Without base_output_directory it writes to
./mt_output, as MaxText documents.
"""

import sys
from collections.abc import Sequence

from maxconv import cli

__all__ = ["main"]


def main(args: Sequence[str]) -> None:
    """Exports the checkpoint of load_parameters_path, with or without lora.lora_restore_path, or
    that adapter alone.

    Args:
        args: a program's name, then MaxText's arguments: `base.yml key=value ...`.

    Raises:
        UserError: the arguments or the files are wrong; nothing was written.
        VerificationError: what was written is not what it should be.
    """
    has_name = args and "=" not in args[0] and not args[0].endswith((".yml", ".yaml"))
    cli.export(args[1 if has_name else 0 :])


if __name__ == "__main__":
    cli.script(["export", *sys.argv[1:]])
