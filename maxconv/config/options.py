"""Every option of the command line, declared once: its type, default, meaning and commands."""

from collections.abc import Mapping
from typing import Any, NamedTuple

CONVERT, PLAN, VERIFY = "convert", "plan", "verify"


class Option(NamedTuple):
    """A `--flag` of maxconv.

    Attributes:
        kind: of its value.
        default: None if there is none, or if it depends; then `help` says on what.
        help: a phrase for `maxconv COMMAND --help`.
        shapes: it decides what the checkpoint is, and is recorded beside it.
        commands: that it is valid with.
    """

    kind: type
    default: Any
    help: str
    shapes: bool = False
    commands: tuple[str, ...] = (CONVERT, PLAN, VERIFY)


OPTIONS: Mapping[str, Option] = {
    "hf_model_path": Option(
        str,
        None,
        "the checkpoint: a directory, gs://bucket/path, or org/name on the Hugging Face Hub; "
        "default: where model_name is published",
        shapes=True,
    ),
    "revision": Option(str, None, "branch, tag or commit of a model on the Hub", shapes=True),
    "save_dtype": Option(
        str,
        "bfloat16",
        "bfloat16, float32, or float8_e4m3fn, which keeps stored dtypes",
        shapes=True,
    ),
    "use_compression": Option(
        bool, False, "compress arrays with zstd, as MaxText does: smaller and slower", shapes=True
    ),
    "overwrite": Option(bool, False, "replace the checkpoint that is there", commands=(CONVERT,)),
    "resume": Option(
        bool,
        False,
        "continue a conversion that was interrupted; without one, start",
        commands=(CONVERT,),
    ),
    "verify": Option(
        str,
        "sample",
        "none, sample or full: what is read back and compared with the source",
        commands=(CONVERT,),
    ),
    "public": Option(
        bool,
        False,
        "a repository that is created on the Hub is public, not private",
        commands=(CONVERT,),
    ),
    "max_host_memory_gb": Option(
        float, None, "GiB that a process may take; default: 1.25, on TPU hosts 4.75"
    ),
    "max_retries": Option(int, 5, "how often a request to a bucket or the Hub is retried"),
    "cache": Option(
        bool, False, "download a model of the Hub into the Hugging Face cache, and read it there"
    ),
    "simulated_cpu_devices_count": Option(
        int, 16, "devices with hardware=cpu; default: as many as the mesh needs, or 16", shapes=True
    ),
    "coordinator_address": Option(
        str, None, "host:port of process 0, where JAX cannot find the processes by itself"
    ),
    "num_processes": Option(int, None, "number of processes, with --coordinator_address"),
    "process_id": Option(int, None, "number of this process, from 0, with --coordinator_address"),
    "lazy_load_tensors": Option(
        bool, True, "make each array when it is written; False: all before the save", shapes=True
    ),
    "eager_load_method": Option(
        str,
        "safetensors",
        "transformers: with --lazy_load_tensors=False, convert what transformers loads, in RAM; "
        "needs pip install 'maxconv[transformers]'",
        shapes=True,
    ),
    "trace": Option(
        str,
        None,
        "write a timeline of the conversion, for ui.perfetto.dev, to this file",
        commands=(CONVERT,),
    ),
    "tpu_type": Option(
        str,
        None,
        "plan for a slice that is not here, such as v5p-64; num_slices= for several",
        commands=(PLAN,),
    ),
    "report": Option(
        str, None, "write a page with pictures of the plan to this file", commands=(PLAN,)
    ),
    "compile": Option(
        bool,
        False,
        "ask the TPU compiler for temporaries and collectives of every program; needs --tpu_type",
        commands=(PLAN,),
    ),
}

# Keys of MaxText, with their meaning for a conversion; defaults are those of configs/base.yml.
KEYS: Mapping[str, str] = {
    "model_name": "MaxText's name of the model; sizes are checked against config.json. "
    "Default: config.json alone decides",
    "base_output_directory": "where to write DIR/0/items: a directory, gs://bucket/path, or "
    "hf://org/name. Default: ./mt_output",
    "hf_lora_adapter_path": "a LoRA adapter: merged into --hf_model_path; without that, converted "
    "by itself",
    "scan_layers": "layers stacked on an axis, or one by one. Default: the model's, else true",
    "param_scan_axis": "axis on which layers are stacked. Default: 1",
    "ici_*_parallelism": "the training mesh within a slice, such as ici_fsdp_parallelism=4; one "
    "may be -1. Default: fsdp over all devices",
    "dcn_*_parallelism": "the training mesh across slices; one may be -1",
    "hardware": "cpu: simulated devices. Default: the TPU, if there is one",
    "use_multimodal": "include the vision encoder. Default: the model's",
    "use_audio": "include the audio encoder. Default: the model's",
    "base_num_decoder_layers": "only the first N layers",
    "override_model_config": "accept sizes (base_emb_dim, ..., vocab_size) that differ from the "
    "model's. Default: false",
    "checkpoint_storage_use_ocdbt": "store arrays in OCDBT. Default: true",
    "checkpoint_storage_use_zarr3": "store arrays as zarr3, else zarr2. Default: true",
    "num_slices": "with --tpu_type, number of slices. Default: 1",
    "logical_axis_rules": "replace MaxText's rules of the same names",
    "jax_distributed_initialization_timeout": "seconds to wait for other processes. Default: 300",
    "skip_jax_distributed_system": "convert in this process alone. Default: false",
}
