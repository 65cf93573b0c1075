"""The timeline of a conversion has all that was read, made and written."""

import json
import time
from pathlib import Path

import tiny
from jobs import job_words

from maxconv import cli
from maxconv.execution import timeline


def test_a_trace_of_a_conversion(tmp_path: Path, capsys) -> None:
    model = tiny.write("qwen3-8b", tmp_path / "hf")
    trace = tmp_path / "trace.json"
    words = job_words(tmp_path, model, tiny.maxtext_words("qwen3-8b", True), "fsdp8")
    before = time.monotonic()
    assert cli.main(["convert", *words, "--verify=none", f"--trace={trace}"]) == 0
    recorded = json.loads(trace.read_text())
    assert before < recorded["otherData"]["began"] < time.monotonic()
    events = recorded["traceEvents"]
    moved = {kind: sum(e["args"]["bytes"] for e in events if e["cat"] == kind) for kind in KINDS}
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert 0.9 * total < moved["read"] <= total
    assert moved["write"] == moved["to host"] >= moved["read"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in events)
    said = capsys.readouterr().out
    assert "time, summed over threads: read " in said and str(trace) in said
    assert timeline._timeline is None


KINDS = ("read", "to device", "compile", "compute", "to host", "write")


def test_nothing_is_kept_when_nobody_asks() -> None:
    with timeline.span("read", "x", 1):
        pass
    with timeline.recorded() as spans, timeline.span("read", "y", 2):
        pass
    assert [(s.kind, s.name, s.nbytes) for s in spans.spans] == [("read", "y", 2)]
    assert set(spans.seconds()) == {"read"}
