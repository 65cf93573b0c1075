"""What the user asked for: MaxText's command line, read into one frozen `Config`."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from maxconv.config import paths
from maxconv.config.argv import MOST_YAML, convert, did_you_mean, load_yaml, shown, split
from maxconv.config.checks import MOST_DEVICES, is_rule, model_problems, value_problems
from maxconv.config.options import OPTIONS
from maxconv.config.tables import (
    MODEL_KEYS,
    defaults,
    known_models,
    maxtext_keys,
)
from maxconv.errors import UserError

_FLAG_TYPES = {name: option.kind for name, option in OPTIONS.items()}
_FLAG_TYPES["num_slices"] = int  # as gcloud and xpk spell it

# MaxText keys that do not affect the checkpoint, or are secret.
_OF_ONE_RUN = (
    "base_output_directory",
    "hf_access_token",
    "jax_distributed_initialization_timeout",
    "skip_jax_distributed_system",
    "enable_single_controller",
)
_MOST_RECORDED = 1000  # arguments
_MOST_CONFIGS = 16  # files, each the `base_config` of the one before

# What may differ between the processes of a conversion; everything else must be the same.
_OF_ONE_PROCESS = (
    "process_id",
    "coordinator_address",
    "jax_distributed_initialization_timeout",
    "hf_access_token",
    "max_host_memory_gb",
    "max_retries",
    "cache",
    "trace",
    "report",
    "notices",
    "words",
)

LogicalAxisRules = tuple[tuple[str, tuple[str, ...]], ...]

_SPECIAL_NOTICES = {
    "custom_mesh_and_rule": "custom_mesh_and_rule is not read: the checkpoint is laid out for the "
    "mesh_axes and logical_axis_rules given here, and loads under any others.",
    "hf_access_token": "hf_access_token: a token on the command line is visible in `ps` and in the "
    "shell history; set HF_TOKEN in the environment instead.",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A conversion as the user asked for it; every value is checked and has its final type."""

    model_name: str | None
    base_output_directory: str
    """An absolute path, or a URL such as gs://bucket/path or hf://org/name as it was given."""
    has_output: bool
    """Whether base_output_directory was given."""
    hf_access_token: str | None = field(repr=False)
    hf_lora_adapter_path: str | None
    load_parameters_path: str | None
    override_model_config: bool
    overrides: Mapping[str, Any]
    """The `MODEL_KEYS` that were given as arguments."""

    scan_layers: bool
    param_scan_axis: int
    checkpoint_storage_use_ocdbt: bool
    checkpoint_storage_use_zarr3: bool

    hardware: str
    skip_jax_distributed_system: bool
    jax_distributed_initialization_timeout: int

    num_slices: int
    allow_split_physical_axes: bool
    parallelism: Mapping[str, int]
    """Every ici_*_parallelism and dcn_*_parallelism."""
    mesh_axes: tuple[str, ...]
    logical_axis_rules: LogicalAxisRules

    lazy_load_tensors: bool
    hf_model_path: str | None
    revision: str | None
    max_retries: int
    cache: bool
    save_dtype: str
    eager_load_method: str
    simulated_cpu_devices_count: int
    use_compression: bool
    verify: str
    overwrite: bool
    resume: bool
    public: bool
    """Whether a repository that is created on the Hub is public."""
    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    max_host_memory_gb: float | None
    max_shard_size: int | None
    """Bytes of the largest file of weights that an export writes, if not the default."""
    lora_restore_path: str | None
    lora_rank: int | None
    lora_alpha: float | None
    """An adapter to merge into what is exported, and how its products are scaled: alpha / rank."""
    names: str
    """Whose names of tensors an export has: "published", or "transformers" in memory."""
    layout: str
    """Whether an export divides tensors among files by "size", or as its "source" does."""
    step: int | None
    """Of a training run, to be exported or laid out anew."""
    train_state: bool
    """Whether a new layout has the whole state of a training run."""
    relayout: str | None
    """The MaxText checkpoint that `plan` plans another layout of."""
    export: str | None
    """The MaxText checkpoint that `plan` plans the export of."""
    tpu_type: str | None
    """The type of slice to plan for, if not the devices of this machine."""
    report: str | None
    """Where `plan` writes its HTML page."""
    compile: bool
    """Whether `plan` compiles every program with the TPU compiler."""
    trace: str | None
    """Where a timeline of the conversion is written."""

    notices: tuple[str, ...]
    """What the user should be told; none of it stops a conversion."""
    words: tuple[str, ...]
    """The arguments that affect the checkpoint, as `key=value`; parsing them gives this config."""

    @property
    def adapter_alone(self) -> bool:
        """Whether an adapter is converted by itself: there is no model to merge it into."""
        base = self.hf_model_path or self.load_parameters_path
        return self.hf_lora_adapter_path is not None and not base

    @property
    def of_all_processes(self) -> dict[str, Any]:
        """The values that all processes of a conversion must have in common, by argument."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        rules = values.pop("logical_axis_rules")
        values |= values.pop("parallelism") | values.pop("overrides")
        values |= {f"logical_axis_rules[{i}]": rule for i, rule in enumerate(rules)}
        return {name: value for name, value in values.items() if name not in _OF_ONE_PROCESS}

    @property
    def scan_axis(self) -> int | None:
        """The axis along which layers are stacked; None if they are not."""
        return self.param_scan_axis if self.scan_layers else None


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> Config:
    """Reads a command line as MaxText does: defaults, then the `.yml`, then arguments or `M_*`.

    Raises:
        UserError: with every problem that was found.
    """
    words = split(argv, _FLAG_TYPES)
    problems, notices = words.problems, list[str]()
    texts = _ours(words.values, problems, notices) | _from_environ(environ, words.values, problems)
    typed = _typed(texts, problems)
    values = dict(defaults()) | {name: option.default for name, option in OPTIONS.items()}
    named = known_models().get(typed.get("model_name", ""), {})
    values["scan_layers"] = named.get("scan_layers", values["scan_layers"])
    from_yml: dict[str, Any] = {}
    if words.yml:
        from_yml = _typed(_read_yml(words.yml, problems, notices), problems, words.yml)
        values |= from_yml
    values["logical_axis_rules"] = _merged(
        values["logical_axis_rules"], named.get("logical_axis_rules", [])
    )
    rules = _merge_rules(values, typed)
    values |= typed | {"logical_axis_rules": rules}
    named_paths = {key: values[key] for key in paths.KEYS if values[key]}
    problems += [p for key, text in named_paths.items() if (p := paths.path_problem(key, text))]
    values |= {key: paths.read_path(text) for key, text in named_paths.items()}

    model_name = None if values["model_name"] == "default" else values["model_name"]
    overrides = {key: typed[key] for key in MODEL_KEYS if key in typed}
    problems += value_problems(values)
    problems += model_problems(model_name, overrides, values["override_model_config"])
    if problems:
        raise UserError(problems)

    shaping = _shaping(from_yml, typed, values)
    notices += _adjust(values, typed)
    values |= {"model_name": model_name, "overrides": overrides}
    values["has_output"] = "base_output_directory" in typed | from_yml
    values |= {"notices": tuple(notices), "words": shaping}
    config = Config(**{f.name: values[f.name] for f in fields(Config)})
    return _of_adapter(config) if config.adapter_alone else config


def _adjust(values: dict[str, Any], typed: Mapping[str, Any]) -> Iterator[str]:
    """Gives checked values their final form; yields notices for the user."""
    parallelism = {key: values[key] for key in values if key.endswith("_parallelism")}
    if "simulated_cpu_devices_count" not in typed:
        needed = _devices(values, parallelism)  # if they are too many, the mesh says so
        values["simulated_cpu_devices_count"] = min(needed, MOST_DEVICES)
    if values["eager_load_method"] != "safetensors" and values["lazy_load_tensors"]:
        yield "eager_load_method has no effect without --lazy_load_tensors=False."
    if "sequence" not in values["mesh_axes"] and parallelism["ici_sequence_parallelism"] != 1:
        yield "ici_sequence_parallelism has no mesh axis, and so no effect, as in MaxText."
    empty_is_none = ("hf_access_token", "hf_lora_adapter_path", "load_parameters_path")
    values |= {
        **{key: values[key] or None for key in empty_is_none},
        "base_output_directory": _absolute(values["base_output_directory"]),
        "skip_jax_distributed_system": values["skip_jax_distributed_system"]
        or values["enable_single_controller"],
        "parallelism": parallelism,
        "mesh_axes": tuple(values["mesh_axes"]),
        "logical_axis_rules": _frozen_rules(values["logical_axis_rules"]),
    }


def _of_adapter(config: Config) -> Config:
    """The config of an adapter that is converted alone: MaxText's directory for it, and no fp8."""
    adapter = os.path.basename(os.path.normpath(config.hf_lora_adapter_path or ""))
    directory = "/".join(
        (config.base_output_directory.rstrip("/"), config.model_name or "", adapter)
    )
    dtype = "float32" if config.save_dtype == "float32" else "bfloat16"
    return replace(config, base_output_directory=directory, save_dtype=dtype)


def _ours(words: Mapping[str, str], problems: list[str], notices: list[str]) -> dict[str, str]:
    """The arguments that we read. Other MaxText keys become a notice, unknown ones problems."""
    known = defaults().keys() | OPTIONS.keys()
    notices += [notice for key, notice in _SPECIAL_NOTICES.items() if words.get(key)]
    others = sorted(words.keys() - known - _SPECIAL_NOTICES.keys())
    for name in others:
        if name.split(".")[0] not in maxtext_keys():  # lora.lora_rank is a part of lora
            near = did_you_mean(name, known | maxtext_keys()) or "; remove it"
            problems.append(f"{shown(name)} is not a key of MaxText{near}")
    if ignored := [name for name in others if name.split(".")[0] in maxtext_keys()]:
        notices.append(f"Arguments that have no effect on a conversion: {', '.join(ignored)}.")
    return {name: text for name, text in words.items() if name in known}


def _from_environ(
    environ: Mapping[str, str], words: Mapping[str, str], problems: list[str]
) -> dict[str, str]:
    """The keys that are set as `M_<KEY>`."""
    found = {key: environ[env] for key in defaults() if (env := f"M_{key.upper()}") in environ}
    problems += [
        f"{key} is set by M_{key.upper()} in the environment too: keep one of the two"
        for key in found.keys() & words.keys()
    ]
    return found


def _typed(values: Mapping[str, Any], problems: list[str], origin: str = "") -> dict[str, Any]:
    """`values` converted to the types of their defaults, without those that are empty or null."""
    typed = {}
    for name, value in values.items():
        kind = OPTIONS[name].kind if name in OPTIONS else type(defaults()[name])
        nulls = ("",) if name in OPTIONS else ("", "none", "null")
        if value is None or (isinstance(value, str) and value.lower() in nulls):
            continue
        try:
            typed[name] = convert(kind, value)
        except ValueError as error:
            where = f" in {origin}" if origin else ""
            problems.append(f"{name}={value}{where} is not {error}")
    return typed


def _read_yml(
    name: str, problems: list[str], notices: list[str], most: int = _MOST_CONFIGS
) -> dict[str, Any]:
    """The keys we read of a config file and of the `base_config` files below it, `most` in all."""
    path = Path(paths.read_path(name))
    if not path.is_file():
        if path.name != "base.yml":  # that one is MaxText's own: our defaults
            problems.append(f"{name}: no such file")
        return {}
    try:
        with path.open(encoding="utf-8") as file:
            content = load_yaml(file.read(MOST_YAML + 1))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        problems.append(f"{name} cannot be read as YAML: {why}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{name} is not a mapping of keys to values")
        return {}
    keys = {str(key): value for key, value in content.items()}
    base = keys.pop("base_config", None)
    if base and most <= 1:
        problems.append(f"{name} is the last of {_MOST_CONFIGS} files that read one another")
        return {}
    below = str(path.parent / paths.read_path(str(base)))
    values = _read_yml(below, problems, notices, most - 1) if base else {}
    if unknown := sorted(keys.keys() - maxtext_keys()):
        names = ", ".join(unknown)
        notices.append(f"{name} has keys that MaxText 0.2.5 does not have, ignored: {names}.")
    return values | {key: value for key, value in keys.items() if key in defaults()}


def _merge_rules(values: Mapping[str, Any], typed: Mapping[str, Any]) -> list[Any]:
    """Typed rules are merged with the others, or replace all if asked to."""
    base, new = values["logical_axis_rules"], typed.get("logical_axis_rules", [])
    if typed.get("override_logical_axis_rules", values["override_logical_axis_rules"]):
        return new or base
    return _merged(base, new)


def _merged(base: list[Any], new: list[Any]) -> list[Any]:
    """Rules, of which new ones replace those of the same names and come last."""
    renewed = {rule[0] for rule in new if is_rule(rule)}
    return [rule for rule in base if not (is_rule(rule) and rule[0] in renewed)] + new


def _frozen_rules(rules: Sequence[Any]) -> LogicalAxisRules:
    return tuple((n, (axes,) if isinstance(axes, str) else tuple(axes or ())) for n, axes in rules)


def _devices(values: Mapping[str, Any], parallelism: Mapping[str, int]) -> int:
    """Simulated devices of a process: as many as a mesh needs whose sizes are all given."""
    sizes = [size for key, size in parallelism.items() if key.startswith("ici_")]
    needed = math.prod(sizes) // (values["num_processes"] or 1)
    return values["simulated_cpu_devices_count"] if -1 in sizes else max(needed, 1)


def _shapes(key: str) -> bool:
    """Whether a key or a flag affects the contents of the checkpoint."""
    return OPTIONS[key].shapes if key in OPTIONS else key in defaults() and key not in _OF_ONE_RUN


def _shaping(
    from_yml: Mapping[str, Any], typed: Mapping[str, Any], values: Mapping[str, Any]
) -> tuple[str, ...]:
    """The arguments that affect the checkpoint, those of the `.yml` included, as `key=value`."""
    said = {key: values[key] for key in from_yml if key not in MODEL_KEYS} | dict(typed)
    if from_yml:
        said["scan_layers"] = values["scan_layers"]
    if "logical_axis_rules" in said:  # by then merged
        said |= {"logical_axis_rules": values["logical_axis_rules"]}
        said |= {"override_logical_axis_rules": True}
    for key in ("hf_model_path", "hf_lora_adapter_path"):
        if key in said and os.path.exists(values[key]):
            said[key] = _absolute(values[key])
    return tuple(f"{key}={_text(value)}" for key, value in said.items() if _shapes(key))


def _text(value: Any) -> str:
    """A value as an argument."""
    return json.dumps(value) if isinstance(value, list) else str(value)


def those_of(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    """The arguments with one of these names, as `name=value`; the others may be invalid."""
    given = split(argv, _FLAG_TYPES).values
    return [f"{name}={given[name]}" for name in names if name in given]


def recorded(arguments: object) -> list[str]:
    """The arguments recorded next to a checkpoint, reduced to those that affect its contents.

    They are untrusted: whoever made the checkpoint wrote them. Arguments that concern one run only
    are dropped: processes and their addresses, tokens, files to write, a `.yml` to read.

    Args:
        arguments: the entry of maxconv.json, which we write from `Config.words`.

    Raises:
        UserError: they are not a list of strings, or a value has the wrong type.
    """
    if not (
        isinstance(arguments, list)
        and len(arguments) <= _MOST_RECORDED
        and all(isinstance(argument, str) for argument in arguments)
    ):
        raise UserError("The arguments recorded next to the checkpoint are not a list of strings.")
    pairs = {key: text for key, is_pair, text in (a.partition("=") for a in arguments) if is_pair}
    problems: list[str] = []
    _typed({key: text for key, text in pairs.items() if _shapes(key)}, problems)
    if problems:
        raise UserError([f"Recorded next to the checkpoint: {problem}." for problem in problems])
    return [f"{key}={text}" for key, text in pairs.items() if _shapes(key)]


def _absolute(directory: str) -> str:
    return directory if "://" in directory else os.path.abspath(directory)
