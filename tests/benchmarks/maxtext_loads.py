"""What MaxText's trainer does before its first step: the model, filled from a checkpoint.

    python maxtext_loads.py maxconv|maxtext KEY=VALUE ...

Run by load_beside.py, with the python that has MaxText; `maxconv` puts its loader in MaxText's place.
"""

import sys
from pathlib import Path


def main(side: str, *words: str) -> None:
    import maxtext
    from maxtext.configs import pyconfig
    from maxtext.utils import train_utils

    if side == "maxconv":
        from maxconv.maxtext import install

        install()
    base = Path(next(iter(maxtext.__path__)), "configs", "base.yml")
    train_utils.setup_train_loop(pyconfig.initialize(["load", str(base), *words]), recorder=None)


if __name__ == "__main__":
    main(*sys.argv[1:])
