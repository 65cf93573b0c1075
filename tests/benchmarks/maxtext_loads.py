"""What MaxText's trainer does before its first step: the model, filled from a checkpoint.

    python maxtext_loads.py maxconv|maxtext KEY=VALUE ...

Run by load_beside.py, with the python that has MaxText; with `maxconv`, its loader is used.
"""

import sys
from pathlib import Path


def main(side: str, *words: str) -> None:
    import maxtext  # pyright: ignore[reportMissingImports]
    from maxtext.configs import pyconfig  # pyright: ignore[reportMissingImports]
    from maxtext.utils import train_utils  # pyright: ignore[reportMissingImports]

    if side == "maxconv":
        from maxconv.maxtext import install

        install()
    base = Path(next(iter(maxtext.__path__)), "configs", "base.yml")
    train_utils.setup_train_loop(pyconfig.initialize(["load", str(base), *words]), recorder=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
