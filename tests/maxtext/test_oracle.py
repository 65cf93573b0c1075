"""MaxText itself makes some of the recorded leaves anew, and they are those on record."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import record  # noqa: E402

SAMPLE = (
    "llama3.1-8b scan float32->bfloat16",
    "mistral-7b unscan bfloat16->bfloat16",
    "qwen2.5-1.5b scan bfloat16->float32",
    "qwen3-0.6b+pad unscan bfloat16->bfloat16",
    "llama3.1-8b scan float32->bfloat16 adapter=linear",
)


@pytest.mark.parametrize("name", SAMPLE)
def test_maxtext_still_makes_what_is_on_record(name: str) -> None:
    assert not record.differences(record.load()[name], record.runs()[name].record())
