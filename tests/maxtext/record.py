"""Records what MaxText's converter makes of the tiny checkpoints, leaf by leaf.

    python record.py [--check] [RUN ...]

converts with `oracle.py`, one process per run, and stores shape, dtype and SHA-256 of every leaf
in `tests/data/maxtext_leaves.json`; with `--check` it compares with that file instead. Without
names it does every run, which takes about half an hour. Runs in the environment that
`environment.sh` makes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

TESTS = Path(__file__).resolve().parents[1]
STORED = TESTS / "data" / "maxtext_leaves.json"
sys.path[:0] = [str(TESTS), str(TESTS / "maxtext")]

import oracle  # noqa: E402
import tiny  # noqa: E402

Leaves = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One conversion by MaxText: a case of `tiny.CASES` and the options of `oracle.py`."""

    case: str
    scan: bool
    dtype: str = "bfloat16"
    save_dtype: str = "bfloat16"
    words: tuple[str, ...] = ()
    adapter: str = ""

    @property
    def name(self) -> str:
        layers = "scan" if self.scan else "unscan"
        adapter = [f"adapter={self.adapter}"] if self.adapter else []
        dtypes = f"{self.dtype}->{self.save_dtype}"
        return " ".join([self.case, layers, dtypes, *self.words, *adapter])

    def convert(self, directory: str) -> Path:
        """Converts in a process of its own and returns the directory of the checkpoint's item."""
        command = [sys.executable, oracle.__file__, self.case, *self.words]
        command += ["--scan" if self.scan else "--no-scan", "--out", directory]
        command += ["--dtype", self.dtype, "--save_dtype", self.save_dtype]
        place = Path(directory)
        if self.adapter:
            command += ["--adapter", self.adapter]
            place = place / tiny.CASES[self.case].model_name / "adapter"
        result = subprocess.run(command, capture_output=True, text=True)
        items = place / "0" / "items"
        if result.returncode or not items.is_dir():
            raise RuntimeError(f"MaxText did not convert {self.name!r}:\n{result.stderr[-4000:]}")
        return items

    def record(self) -> dict[str, Any]:
        """Converts and describes the result as `maxtext_leaves.json` stores it."""
        overrides = dict(word.split("=", 1) for word in self.words)
        entry = {
            "case": self.case,
            "words": tiny.maxtext_words(self.case, self.scan, **overrides),
            "source_dtype": self.dtype,
            "save_dtype": self.save_dtype,
        }
        if self.adapter:
            entry["adapter"] = self.adapter
        model_name = tiny.CASES[self.case].model_name
        if not self.adapter and (model_name, self.scan) in oracle.REPAIRS:
            entry["repaired"], _ = oracle.REPAIRS[model_name, self.scan]
        with tempfile.TemporaryDirectory() as directory:
            entry["leaves"] = leaves(self.convert(directory))
        return entry


def runs() -> dict[str, Run]:
    """All runs to record, by name."""
    every = [
        Run(case, scan, save_dtype=save_dtype)
        for case, scan in tiny.LAYERS
        if tiny.CASES[case].converts
        for save_dtype in tiny.CASES[case].save_dtypes
    ]
    every += [
        # Sources that MaxText rounds before its hooks see them.
        Run("llama3.1-8b", True, dtype="float32"),
        Run("llama3.1-8b", False, dtype="float32", save_dtype="float32"),
        Run("qwen3-0.6b+pad", True, dtype="float16"),
        Run("qwen2.5-7b", False, dtype="float16", save_dtype="float32"),
        # Layers stacked on another axis, and only the first layers of a checkpoint.
        Run("llama3.1-8b", True, words=("param_scan_axis=0",)),
        Run("qwen2.5-1.5b", True, words=("param_scan_axis=0",)),
        Run("qwen3-8b", True, words=("base_num_decoder_layers=2",)),
        Run("llama3.1-8b", False, words=("base_num_decoder_layers=2",)),
        # Rows of the vocabulary are cut.
        Run("gemma3-4b", True, words=("vocab_size=250",)),
    ]
    # Nothing is rounded to bfloat16: the hooks work on all bits of float32.
    every += [
        Run(case, True, dtype="float32", save_dtype="float32")
        for case in (
            *("qwen3-30b-a3b", "mixtral-8x7b", "olmo3-7b", "gemma2-2b"),
            *(
                "gemma3-4b+vision",
                "gemma4-26b+vision",
                "qwen3-next-80b-a3b",
                "qwen3.5-35b-a3b+vision",
            ),
        )
    ]
    # Adapters alone. What MaxText makes of others is not what its model adds: of those of experts
    # that are not scanned, and of queries that are scaled in models other than llama3.1.
    every += [
        Run(case, scan, dtype, save_dtype, adapter=adapter)
        for case, adapter in (
            ("llama3.1-8b", "linear"),
            ("llama3.1-8b", "some"),
            ("qwen3-8b", "linear"),
            ("qwen3-30b-a3b", "attention"),
            ("qwen3-30b-a3b", "router"),
            ("deepseek2-16b", "attention"),
            ("qwen3-next-80b-a3b", "attention"),
        )
        for scan in (True, False)
        for dtype, save_dtype in (("float32", "bfloat16"), ("bfloat16", "float32"))
    ]
    every.append(Run("llama3.1-8b", True, "float32", "float32", adapter="linear"))
    every.append(Run("qwen3-30b-a3b", True, "float32", "bfloat16", adapter="linear"))
    every.append(Run("gemma3-4b", True, "float32", "bfloat16", adapter="language"))
    every.append(Run("gemma3-4b", False, "bfloat16", "float32", adapter="language"))
    return {run.name: run for run in every}


def leaves(items: Path) -> Leaves:
    """Shape, dtype and SHA-256 (little-endian, C order) of every array of an Orbax item."""
    kvstore = {"driver": "ocdbt", "base": f"file://{items}/"}
    keys = ts.KvStore.open(kvstore).result().list().result()
    suffix = b"/zarr.json"
    names = sorted(key.removesuffix(suffix).decode() for key in keys if key.endswith(suffix))
    return {name: _describe(kvstore, name) for name in names}


def _describe(kvstore: dict[str, str], name: str) -> dict[str, Any]:
    store = ts.open({"driver": "zarr3", "kvstore": kvstore | {"path": f"{name}/"}}).result()
    array = np.ascontiguousarray(store.read().result())
    digest = hashlib.sha256(array.tobytes()).hexdigest()
    return {"shape": list(store.shape), "dtype": store.dtype.name, "sha256": digest}


def load() -> dict[str, Any]:
    """What is stored, by name of the run."""
    return json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}


def save(entries: dict[str, Any]) -> None:
    """Stores the entries, one leaf a line, in the order in which they were first made."""
    lines = []
    for name in [name for name in entries if name in runs()]:
        fields = []
        for key, value in entries[name].items():
            text = json.dumps(value)
            if key == "leaves":
                rows = [f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()]
                text = "{\n" + ",\n".join(rows) + "\n    }"
            fields.append(f"    {json.dumps(key)}: {text}")
        lines.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(fields) + "\n  }")
    STORED.parent.mkdir(exist_ok=True)
    STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def differences(stored: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """One line for each thing in which two entries differ."""
    found = [key for key in made if key != "leaves" and stored.get(key) != made[key]]
    before, after = stored.get("leaves", {}), made["leaves"]
    found += [n for n in sorted(before.keys() | after.keys()) if before.get(n) != after.get(n)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Records what MaxText's converter makes.")
    parser.add_argument("run", nargs="*", help="name of a run; all of them by default")
    parser.add_argument("--check", action="store_true", help="compare with what is stored")
    parser.add_argument("--list", action="store_true", help="print the names of the runs")
    args = parser.parse_args()
    every = runs()
    if unknown := set(args.run) - every.keys():
        parser.error(f"no such run: {', '.join(sorted(unknown))}")
    if args.list:
        print("\n".join(every))
        return 0

    status = 0
    for name in args.run or every:
        made = every[name].record()
        entries = load()
        if args.check:
            wrong = differences(entries.get(name, {}), made)
            print(f"{name}: {'differs: ' + ', '.join(wrong) if wrong else 'equal'}", flush=True)
            status |= bool(wrong)
        else:
            entries[name] = made
            save(entries)
            print(f"{name}: {len(made['leaves'])} leaves", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
