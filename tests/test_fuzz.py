"""Random mutations of every file that is parsed: a sentence and exit code 2, or a correct plan.

MAXCONV_FUZZ=300 tries so many of each kind, from the seed MAXCONV_FUZZ_SEED.
"""

import copy
import json
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import CPU

from maxconv.cli import commands
from maxconv.errors import UserError, failure_text

COUNT = int(os.environ.get("MAXCONV_FUZZ", "40"))
SEED = int(os.environ.get("MAXCONV_FUZZ_SEED", "2026"))
MODELS = ("llama3.1-8b", "qwen3-30b-a3b", "gemma3-4b+vision", "gemma4-e4b", "qwen3.5-35b-a3b-fp8")

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, 2**31 - 1, 2**63, 10**15, 10**400),
    *(0.5, -0.0, 1e300, float("nan"), float("inf"), "", "x", "²", "9" * 5000, "\x1b[2J", "\ud800"),
    *("a\0b", "../x", "x" * 100_000, [], {}, [0], [1, 2, 3], ["a", None], {"a": {"b": []}}),
    *([[[[]]]], {"": 0}, ["q_proj"], {"(a+)+$": 3}, {"q_proj": 1e400}, "F64", "I64", "BF16", "F4"),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every entry."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def mutated(content: Any, rng: random.Random) -> str:
    """JSON in which a few entries are others, are gone or have other names; or broken JSON."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        if not (found := [*places(content)]):
            break
        *outer, key = rng.choice(found)
        at = content
        for one in outer:
            at = at[one]
        match rng.randrange(6):
            case 0:
                del at[key]
            case 1 if isinstance(at, dict):
                at[rng.choice([*map(str, VALUES[15:22]), str(key)[:-1], f"{key}²"])] = at.pop(key)
            case 2:
                *others, other = rng.choice(found)
                value = content
                for one in others:
                    value = value[one] if one in value or isinstance(one, int) else {}
                at[key] = copy.deepcopy(value)
            case 3 if isinstance(at[key], int) and not isinstance(at[key], bool):
                at[key] += rng.choice((-1, 1, at[key], -at[key]))
            case _:
                at[key] = copy.deepcopy(rng.choice(VALUES))
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.15:  # bytes that are no JSON any more, or another one
        begin, n = rng.randrange(len(text)), rng.randrange(1, 20)
        before, cut, after = text[:begin], text[begin : begin + n], text[begin + n :]
        text = before + rng.choice(("", cut * 2, "\0")) + after
    return text


def encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def header(model: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(model.glob("*.safetensors")))
    raw = file.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    text = encoded(mutated(json.loads(raw[8 : 8 + n]), rng))
    length = rng.choice((len(text),) * 12 + (len(text) + 1, 0, 2**63))
    file.write_bytes(length.to_bytes(8, "little") + text + raw[8 + n :])


def json_file(name: str) -> Callable[[Path, random.Random], None]:
    def change(model: Path, rng: random.Random) -> None:
        file = model / name
        file.write_bytes(encoded(mutated(json.loads(file.read_text()), rng)))

    return change


def adapter(model: Path, rng: random.Random) -> None:
    if rng.random() < 0.5:
        header(model / "adapter", rng)
    else:
        json_file("adapter_config.json")(model / "adapter", rng)


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    "header": header,
    "index": json_file("model.safetensors.index.json"),
    "config": json_file("config.json"),
    "adapter": adapter,
}


def planned(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code of a plan; and its leaves, or the sentence that it ends with.

    Without the kernel of logits: whether embeddings are tied, config.json alone decides.
    """
    try:
        commands.plan(words)
        code, said = 0, ""
    except UserError as error:
        code, said = error.exit_code, failure_text(error)
    out, err = capsys.readouterr()
    assert all(line.isprintable() for line in (out + err + said).split("\n")), "not printable"
    leaves = out.partition("leaf ")[2].partition("\n\n")[0].splitlines()[1:]
    kept = (" ".join(line.split()) for line in leaves if "logits_dense" not in line)
    return code, said or "\n".join(kept)


@pytest.mark.parametrize("kind", KINDS)
def test_mutations(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ("llama3.1-8b", "gemma3-4b") if kind == "adapter" else MODELS
    whole: dict[tuple[str, bool], str] = {}

    def words(case: str, alone: bool, model: Path) -> list[str]:
        found = [*CPU, f"hf_lora_adapter_path={model / 'adapter'}"] if kind == "adapter" else [*CPU]
        if alone:
            return [*found, *tiny.maxtext_words(case, True)]
        return [*found, f"--hf_model_path={model}", f"scan_layers={case != 'gemma4-e4b'}"]

    for case in models:
        model = tiny.write(case, tmp_path / case)
        if kind == "adapter":
            config = tiny.write_adapter(case, "linear", model / "adapter") / "adapter_config.json"
            whole[case, True] = planned(words(case, True, model), capsys)[1]
            config.write_text(config.read_text().replace("{", '{"alpha_pattern":{"q_proj": 3},', 1))
        code, whole[case, False] = planned(words(case, False, model), capsys)
        assert code == 0, whole
    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    outcomes, slowest, faults = Counter[str](), 0.0, list[str]()
    for i in range(COUNT):
        rng = random.Random(f"{SEED} {kind} {i}")
        case = rng.choice(models)
        alone = kind == "adapter" and rng.random() < 0.5
        model = tmp_path / "mutated"
        shutil.copytree(tmp_path / case, model)
        KINDS[kind](model, rng)
        before = time.monotonic()
        try:
            code, said = planned(words(case, alone, model), capsys)
            kept = "same plan" if said == whole[case, alone] else "another plan"
            outcomes["refused" if code else kept] += 1
            if not code and kept == "another plan":
                faults.append(f"{kind} {i} {case}: another plan")
        except Exception as error:
            faults.append(f"{kind} {i} {case}: {error!r:.200}")
        slowest = max(slowest, time.monotonic() - before)
        shutil.rmtree(model)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - peak_before
    with capsys.disabled():
        print(f"\n{kind}: {dict(outcomes)}, slowest {slowest:.1f} s, peak +{grown} MiB", end=" ")
    assert not faults, "\n".join(faults)
    assert slowest < 60 and grown < 1024
