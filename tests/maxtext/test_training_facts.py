"""`configs/training.yml` has what MaxText's own files have."""

from pathlib import Path
from typing import Any

import maxtext
import yaml

from maxconv.config.tables import MODEL_KEYS, known_models, trained_models

CONFIGS = Path(next(iter(maxtext.__path__))) / "configs"
OURS = {"model_name", "hf_id", "architecture", "train_as", "param_scan_axis", *MODEL_KEYS}
OURS -= {"rope_type"}


def test_the_facts_are_those_of_maxtext() -> None:
    base = yaml.safe_load((CONFIGS / "base.yml").read_text())
    wrong = {}
    for name, facts in trained_models().items():
        file = facts.get("train_as", name).replace("-Instruct", "")
        path = CONFIGS / f"models/{file}.yml"
        own = yaml.safe_load(path.read_text()) if name in known_models() else {}
        theirs = base | own
        for key in facts.keys() - OURS:
            if plain(facts[key]) != plain(theirs[key]) and not is_named_llama(name, key):
                wrong[name, key] = facts[key], theirs[key]
    assert not wrong


def plain(value: Any) -> Any:
    """YAML 1.1 takes 1e-6 for a string, and MaxText then makes a number of it."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def is_named_llama(name: str, key: str) -> bool:
    """MaxText goes by the model_name here, whatever rope_type says."""
    return key == "rope_type" and name.startswith("llama3.1")
