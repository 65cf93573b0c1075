"""Every command-line option, declared once: its type, default, help text and commands."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from maxconv.config.argv import Size

CONVERT, EXPORT, RELAYOUT = "convert", "export", "relayout"
PLAN, VERIFY = "plan", "verify"
WRITE = CONVERT, EXPORT, RELAYOUT
CONVERSIONS = CONVERT, RELAYOUT, PLAN, VERIFY
ALL = *CONVERSIONS, EXPORT
FROM_HUGGING_FACE = CONVERT, PLAN, VERIFY


class Option(NamedTuple):
    """A `--flag` of maxconv.

    Attributes:
        kind: type of its value.
        default: None if there is none, or if it depends on something that `help` then names.
        help: its description in `maxconv COMMAND --help`.
        shapes: whether it affects the contents of the checkpoint, and so is recorded beside it.
        commands: the commands it is valid with.
    """

    kind: type
    default: Any
    help: str
    shapes: bool = False
    commands: tuple[str, ...] = CONVERSIONS


class Key(NamedTuple):
    """A MaxText config key that affects a conversion: its description, and where it is listed."""

    help: str
    commands: tuple[str, ...] = CONVERSIONS


# What some of them mean to an export, if that is another thing.
EXPORTED: Mapping[str, str] = {
    "base_output_directory": "where the Hugging Face checkpoint goes: a directory that all "
    "processes share, gs://bucket/path, or hf://org/name. Default: ./mt_output",
    "hf_model_path": "a checkpoint of the same model, with the names, shapes, dtypes and files to "
    "write: a directory, gs://bucket/path, or org/name on the Hugging Face Hub. Default: the Hub "
    "repository of model_name",
    "param_scan_axis": "axis along which the checkpoint's layers are stacked. Default: 1",
    "resume": "continue an interrupted export to a directory, or start if there is none to "
    "continue",
    "save_dtype": "dtype of all floating-point tensors: bfloat16 or float32. Default: the "
    "published one of each tensor",
    "trace": "file to write a timeline of the export to; open it with ui.perfetto.dev",
    "verify": "how much of the result to read back and compare with the checkpoint: none, sample "
    "or full. Default: sample",
}

# The same for a new layout.
LAID_OUT: Mapping[str, str] = {
    "base_num_decoder_layers": "take only the first N layers. Default: all",
    "hf_model_path": "a checkpoint of the same model at Hugging Face, of which config.json and "
    "headers are read: a directory, gs://bucket/path, or org/name on the Hub. Default: what "
    "CHECKPOINT was converted from, or the Hub repository of model_name",
    "param_scan_axis": "axis along which layers are to be stacked. Default: as in CHECKPOINT",
    "save_dtype": "dtype of the weights: bfloat16 or float32. Default: as in CHECKPOINT",
    "scan_layers": "whether layers are to be stacked into one leaf (true) or to be separate leaves "
    "(false). Default: as in CHECKPOINT",
    "trace": "file to write a timeline to; open it with ui.perfetto.dev",
    "verify": "how much of the result to read back and compare with CHECKPOINT: none, sample or "
    "full. Default: sample",
}
MEANINGS = {EXPORT: EXPORTED, RELAYOUT: LAID_OUT}

OPTIONS: Mapping[str, Option] = {
    "hf_model_path": Option(
        str,
        None,
        "the checkpoint to convert: a directory, gs://bucket/path, or org/name on the Hugging Face "
        "Hub. Default: the Hub repository of model_name",
        shapes=True,
        commands=ALL,
    ),
    "revision": Option(
        str, None, "branch, tag or commit of the model on the Hub", shapes=True, commands=ALL
    ),
    "save_dtype": Option(
        str,
        "bfloat16",
        "dtype of the saved weights: bfloat16, float32, or float8_e4m3fn, which keeps each "
        "tensor's stored dtype",
        shapes=True,
        commands=ALL,
    ),
    "use_compression": Option(
        bool, False, "compress arrays with zstd, as MaxText does: smaller but slower", shapes=True
    ),
    "overwrite": Option(
        bool,
        False,
        "replace an existing checkpoint instead of refusing",
        commands=WRITE,
    ),
    "resume": Option(
        bool,
        False,
        "continue an interrupted conversion, or start if there is none to continue",
        commands=WRITE,
    ),
    "verify": Option(
        str,
        "sample",
        "how much of the result to read back and compare with the source: none, sample or full",
        commands=WRITE,
    ),
    "public": Option(
        bool,
        False,
        "if a Hub repository has to be created, make it public instead of private",
        commands=WRITE,
    ),
    "max_host_memory_gb": Option(
        float,
        None,
        "host memory that each process may use in all, in GiB. Default: 1.25; 4.75 on TPU hosts",
        commands=ALL,
    ),
    "max_retries": Option(
        int, 5, "how many times a failed request to a bucket or the Hub is retried", commands=ALL
    ),
    "cache": Option(
        bool,
        False,
        "download the model into the Hugging Face cache first, and read it from there",
        commands=ALL,
    ),
    "simulated_cpu_devices_count": Option(
        int,
        16,
        "number of simulated devices per process with hardware=cpu. Default: as many as the mesh "
        "needs, or 16 if its size is not given",
        shapes=True,
        commands=ALL,
    ),
    "coordinator_address": Option(
        str,
        None,
        "host:port of process 0; needed only where JAX does not detect the cluster, together with "
        "the next two",
        commands=ALL,
    ),
    "num_processes": Option(int, None, "total number of processes", commands=ALL),
    "process_id": Option(int, None, "index of this process, from 0", commands=ALL),
    "lazy_load_tensors": Option(
        bool,
        True,
        "whether to make each array only when it is written (True), or all of them before the save "
        "(False)",
        shapes=True,
    ),
    "eager_load_method": Option(
        str,
        "safetensors",
        "safetensors, or transformers: load the whole model in RAM with transformers and convert "
        "that; needs --lazy_load_tensors=False and pip install 'maxconv[transformers]'",
        shapes=True,
        commands=FROM_HUGGING_FACE,
    ),
    "max_shard_size": Option(
        Size,
        None,
        "largest file of weights to write: a number of bytes, or of KB, MB, GB or GiB. "
        "Default: 5GB",
        shapes=True,
        commands=(EXPORT, PLAN),
    ),
    "lora_restore_path": Option(
        str,
        None,
        "MaxText's lora.lora_restore_path: the checkpoint of a LoRA adapter to merge into "
        "CHECKPOINT; if CHECKPOINT is not given, the adapter is exported alone, for PEFT",
        shapes=True,
        commands=(EXPORT, PLAN),
    ),
    "lora_rank": Option(
        int,
        None,
        "MaxText's lora.lora_rank. Default: as the adapter has it",
        shapes=True,
        commands=(EXPORT, PLAN),
    ),
    "lora_alpha": Option(
        float,
        None,
        "MaxText's lora.lora_alpha. Default: as the adapter has it",
        shapes=True,
        commands=(EXPORT, PLAN),
    ),
    "names": Option(
        str,
        "published",
        "names of tensors: published, as in --hf_model_path; or transformers, those that "
        "transformers 5 has in memory, with the experts of a layer in one tensor",
        shapes=True,
        commands=(EXPORT, PLAN),
    ),
    "layout": Option(
        str,
        "size",
        "which tensors are in which file: size, as --max_shard_size allows; or source, as in "
        "--hf_model_path, in files of the same names. Default: size",
        shapes=True,
        commands=(EXPORT, PLAN),
    ),
    "step": Option(
        int,
        None,
        "step of a training run to take. Default: its last",
        commands=(EXPORT, RELAYOUT, PLAN),
    ),
    "train_state": Option(
        bool,
        False,
        "take the whole state of a training run, moments of the optimizer and step included, "
        "instead of the weights alone",
        shapes=True,
        commands=(RELAYOUT, PLAN),
    ),
    "relayout": Option(
        str,
        None,
        "plan another layout of this MaxText checkpoint, with the arguments of maxconv relayout",
        commands=(PLAN,),
    ),
    "export": Option(
        str,
        None,
        "plan the export of this MaxText checkpoint, with the arguments of maxconv export",
        commands=(PLAN,),
    ),
    "trace": Option(
        str,
        None,
        "file to write a timeline of the conversion to; open it with ui.perfetto.dev",
        commands=WRITE,
    ),
    "tpu_type": Option(
        str,
        None,
        "plan for this type of slice, such as v5p-64, or v6e-8:ct6e-standard-4t with a machine "
        "type; no TPU is needed",
        commands=(PLAN,),
    ),
    "report": Option(str, None, "HTML file to write the plan to, with diagrams", commands=(PLAN,)),
    "compile": Option(
        bool,
        False,
        "compile every program for the --tpu_type, and list its temporary memory and collectives; "
        "needs pip install 'maxconv[tpu]'",
        commands=(PLAN,),
    ),
}

# MaxText's config keys that affect a conversion, and how; defaults are those of configs/base.yml.
KEYS: Mapping[str, Key] = {
    "model_name": Key(
        "MaxText's name of the model; config.json must have the same sizes. "
        "Default: the model is identified from config.json",
        commands=ALL,
    ),
    "base_output_directory": Key(
        "where the checkpoint goes, in DIR/0/items: a directory, "
        "gs://bucket/path, or hf://org/name. Default: ./mt_output",
        commands=(*WRITE, PLAN),
    ),
    "hf_lora_adapter_path": Key(
        "a LoRA adapter to merge into --hf_model_path; if that is not given, the "
        "adapter is converted alone",
        commands=FROM_HUGGING_FACE,
    ),
    "scan_layers": Key(
        "whether layers are stacked into one leaf (true) or are separate leaves (false). "
        "Default: as in MaxText's config of the model, else true"
    ),
    "param_scan_axis": Key("axis along which layers are stacked. Default: 1", commands=ALL),
    "ici_*_parallelism": Key(
        "sizes of the training mesh within a slice, such as ici_fsdp_parallelism=4; one may be -1: "
        "all devices that are left. Default: fsdp over all devices"
    ),
    "dcn_*_parallelism": Key(
        "sizes of the training mesh across slices; one may be -1. Default: data "
        "parallelism over all slices"
    ),
    "hardware": Key(
        "cpu: use simulated devices. Default: the TPU, or the CPU if there is none", commands=ALL
    ),
    "use_multimodal": Key(
        "include the vision encoder. Default: as in MaxText's config of the model",
        commands=FROM_HUGGING_FACE,
    ),
    "use_audio": Key(
        "include the audio encoder. Default: as in MaxText's config of the model",
        commands=FROM_HUGGING_FACE,
    ),
    "base_num_decoder_layers": Key("convert only the first N layers. Default: all"),
    "override_model_config": Key(
        "accept sizes on the command line (base_emb_dim, ..., vocab_size) that "
        "differ from those of model_name. Default: false",
        commands=ALL,
    ),
    "checkpoint_storage_use_ocdbt": Key("store arrays in OCDBT. Default: true"),
    "checkpoint_storage_use_zarr3": Key(
        "store arrays as zarr3 (true) or zarr2 (false). Default: true"
    ),
    "num_slices": Key(
        "number of slices that the devices are in; with --tpu_type, to plan for. Default: as many "
        "as are found; 1 with --tpu_type"
    ),
    "logical_axis_rules": Key(
        "sharding rules, as a YAML list of [logical axis, [mesh axes]]; they "
        "replace MaxText's default rules for the same logical axes"
    ),
    "jax_distributed_initialization_timeout": Key(
        "seconds to wait for the other processes to join. Default: 300", commands=ALL
    ),
    "skip_jax_distributed_system": Key(
        "do not look for other processes: convert in this one alone. Default: false", commands=ALL
    ),
}
