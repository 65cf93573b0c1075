"""A command line in MaxText's terms, read into one frozen `Config`."""

from maxconv.config.config import Config, LogicalAxisRules, parse, recorded, those_of
from maxconv.config.tables import config_path, model_facts

__all__ = [
    "Config",
    "LogicalAxisRules",
    "config_path",
    "model_facts",
    "parse",
    "recorded",
    "those_of",
]
