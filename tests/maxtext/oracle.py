"""Converts a tiny checkpoint with MaxText's own converter.

    python oracle.py CASE --scan --dtype bfloat16 --save_dtype bfloat16 --out DIR [KEY=VALUE ...]

writes the checkpoint that `tests/tiny.py` makes to DIR/hf and MaxText's conversion of it to
DIR/0/items; with `--adapter NAME` a LoRA adapter of the case instead, to DIR/adapter and
DIR/MODEL/adapter/0/items. Runs in the environment that `environment.sh` makes, not in maxconv's.
Words after the options are further MaxText config words; they win over those of the case.

MaxText's converter runs unchanged, as a program. Only what it finds in its surroundings is
different, each for the reason given at the function that does it.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny  # noqa: E402

MISTRAL_REPAIR = (
    "MaxText 0.2.5 lists mistral-7b in HF_IDS but in no parameter mapping; the llama3.1 mapping "
    "and hooks were lent to it, less adjust_rope: its rotary embedding pairs halves, as in HF"
)

STACKING_REPAIR = (
    "MaxText 0.2.5 takes routers and shared experts of scanned layers for lists of experts and "
    "stacks them on axis 0, so that it crashes; they were stacked on param_scan_axis, as the model "
    "has them"
)

BIAS_REPAIR = (
    "MaxText 0.2.5 maps the routed bias to a parameter of the decoder, but the model has it in the "
    "collection MoEBiasVar, so that the converter crashes; it was mapped to that"
)

GEMMA3_REPAIR = (
    "MaxText 0.2.5 reads gemma3 by the names that transformers gives its tensors in memory; its "
    "mapping was given those of the published files"
)

GEMMA4_REPAIR = (
    "MaxText 0.2.5 maps the layers after gemma4's last whole block one by one, but its model "
    "stacks them, so that it crashes; they were mapped as a stack"
)


def lend_model_config(model_name: str, config: dict[str, Any]) -> None:
    """MaxText describes the checkpoint by a table of the published models, not by config.json."""
    from maxtext.checkpoint_conversion.utils import hf_model_configs

    hf_model_configs.HF_MODEL_CONFIGS[model_name] = SimpleNamespace(to_dict=lambda: config)


def lend_mistral_mapping(model_name: str) -> None:
    """Repairs the missing mapping of mistral-7b.

    MaxText's mistral layer equals its llama2 layer, which llama3.1 uses too: it does not scale the
    attention logits, so the query kernel has to carry 1/sqrt(head_dim). But only model names that
    start with "llama3.1" get the rotary embedding of interleaved pairs (layers/attentions.py,
    init_rotary_embedding); mistral gets the one that pairs the two halves, as Hugging Face does.
    """
    from maxtext.checkpoint_conversion.utils import param_mapping

    def hooks(*args: Any, **kwargs: Any) -> dict[str, Any]:
        llama = param_mapping.LLAMA31_MAXTEXT_TO_HF_PARAM_HOOK_FN(*args, **kwargs)
        return {key: _without_adjust_rope(hook) for key, hook in llama.items()}

    param_mapping.PARAM_MAPPING[model_name] = param_mapping.LLAMA31_MAXTEXT_TO_HF_PARAM_MAPPING
    param_mapping.HOOK_FNS[model_name] = hooks


def _without_adjust_rope(hook: Any) -> Any:
    if not isinstance(hook, list):
        return hook
    return [step for step in hook if step.__name__ != "adjust_rope"]


def repair_stacking(model_name: str) -> None:
    """Repairs the router and shared experts of scanned layers.

    `_build_single_axis_stacked_tensor` stacks every leaf with "MoeBlock" in its name on axis 0,
    which is right only for the experts of an unscanned layer. So the others are mapped as what
    MaxText calls a composite: a tuple of tensors that the hook makes one leaf of.
    """
    import numpy as np
    from maxtext.checkpoint_conversion.utils import param_mapping

    original_mapping = param_mapping.PARAM_MAPPING[model_name]
    original_hooks = param_mapping.HOOK_FNS[model_name]

    def is_wrong(key: Any, tensors: Any) -> bool:
        is_stack = isinstance(tensors, list) and isinstance(tensors[0], str)
        return is_stack and "MoeBlock" in key and not key.startswith("MoEBiasVar")

    def mapping(*args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original_mapping(*args, **kwargs)
        return {key: tuple(x) if is_wrong(key, x) else x for key, x in found.items()}

    def hooks(config: Any, maxtext_config: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        found = original_hooks(config, maxtext_config, *args, **kwargs)
        tensors = original_mapping(config, maxtext_config, scan_layers=True)

        def stacking(hook: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
            def stack(layers: tuple[np.ndarray, ...], shape: tuple[int, ...]) -> np.ndarray:
                axis = maxtext_config.param_scan_axis
                kernels = [hook(layer, (*shape[:axis], *shape[axis + 1 :])) for layer in layers]
                return np.stack(kernels, axis=axis)

            return stack

        wrong = {key for key, x in tensors.items() if is_wrong(key, x)}
        return {key: stacking(hook) if key in wrong else hook for key, hook in found.items()}

    param_mapping.PARAM_MAPPING[model_name] = mapping
    param_mapping.HOOK_FNS[model_name] = hooks


def repair_bias(model_name: str) -> None:
    """Repairs the names of the routed biases."""
    from maxtext.checkpoint_conversion.utils import param_mapping

    original = param_mapping.PARAM_MAPPING[model_name]

    def mapping(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {
            key.replace("params-", "MoEBiasVar-") if key.endswith("-gate-bias") else key: tensors
            for key, tensors in original(*args, **kwargs).items()
        }

    param_mapping.PARAM_MAPPING[model_name] = mapping


def repair_bias_and_stacking(model_name: str) -> None:
    """Repairs scanned DeepSeek-V3: both of the above."""
    repair_bias(model_name)
    repair_stacking(model_name)


def lend_names(model_name: str, names: dict[str, str]) -> None:
    """Gives the mapping of a model other names of tensors: how each begins, instead of how."""
    from maxtext.checkpoint_conversion.utils import param_mapping

    original = param_mapping.PARAM_MAPPING[model_name]

    def renamed(tensor: Any) -> Any:
        if isinstance(tensor, list):
            return [renamed(one) for one in tensor]
        return next(
            (b + tensor[len(a) :] for a, b in names.items() if tensor.startswith(a)), tensor
        )

    def mapping(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key: renamed(tensor) for key, tensor in original(*args, **kwargs).items()}

    param_mapping.PARAM_MAPPING[model_name] = mapping


def lend_gemma3_names(model_name: str) -> None:
    """Repairs the names of gemma3, so that the very checkpoint that maxconv reads is converted."""
    names = {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    }
    lend_names(model_name, names)


def lend_gemma4_remainder(model_name: str) -> None:
    """Repairs the layers of scanned gemma4 that make no whole block (none, at published sizes)."""
    from maxtext.checkpoint_conversion.utils import param_mapping

    def stacked(original: Callable[..., Any]) -> Callable[..., Any]:
        def gathered(*args: Any, **kwargs: Any) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for key, value in original(*args, **kwargs).items():
                name, layers = re.subn(r"(layers_remainder)-layers_\d+", r"\1-local_layers", key)
                is_tensor = layers and isinstance(value, str)
                found[name] = [*found.get(name, []), value] if is_tensor else value
            return found

        return gathered

    for table in (param_mapping.PARAM_MAPPING, param_mapping.HOOK_FNS):
        table[model_name] = stacked(table[model_name])


# By model and whether layers are scanned: what is repaired, and how.
REPAIRS: dict[tuple[str, bool], tuple[str, Callable[[str], None]]] = {
    ("mistral-7b", True): (MISTRAL_REPAIR, lend_mistral_mapping),
    ("mistral-7b", False): (MISTRAL_REPAIR, lend_mistral_mapping),
    ("gemma3-4b", True): (GEMMA3_REPAIR, lend_gemma3_names),
    ("gemma3-4b", False): (GEMMA3_REPAIR, lend_gemma3_names),
    ("gemma4-31b", True): (GEMMA4_REPAIR, lend_gemma4_remainder),
    ("mixtral-8x7b", True): (STACKING_REPAIR, repair_stacking),
    ("deepseek2-16b", True): (STACKING_REPAIR, repair_stacking),
    ("deepseek3-671b", True): (f"{BIAS_REPAIR}. {STACKING_REPAIR}", repair_bias_and_stacking),
    ("deepseek3-671b", False): (BIAS_REPAIR, repair_bias),
    ("deepseek3.2-671b", True): (f"{BIAS_REPAIR}. {STACKING_REPAIR}", repair_bias_and_stacking),
    ("deepseek3.2-671b", False): (BIAS_REPAIR, repair_bias),
}


def stand_in_for_torch(save_dtype: str) -> None:
    """Rounds tensors to bfloat16 while they are read, as MaxText does where torch is installed.

    Without torch (gigabytes of CUDA for one cast) `_convert_tensor_to_numpy` returns arrays as
    they are. With torch it is `tensor.to(torch.float32).numpy().astype(ml_dtypes.bfloat16)`, and
    for float8 what is fp8, bfloat16 or float32 stays as it is. Files that MaxText opens for torch,
    without lazy loading, are opened for numpy.
    """
    import numpy as np
    import safetensors

    class RoundingFile:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = original(*args, **kwargs | {"framework": "np"})

        def keys(self) -> list[str]:
            return self._file.keys()

        def __enter__(self) -> RoundingFile:
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def get_tensor(self, name: str) -> np.ndarray:
            tensor = self._file.get_tensor(name)
            if save_dtype == "float8_e4m3fn" and tensor.dtype in kept:
                return tensor
            return tensor.astype(np.float32).astype(rounded)

    kept = [tiny.DTYPES[name] for name in ("float8_e4m3fn", "bfloat16", "float32")]
    rounded = tiny.DTYPES["float32" if save_dtype == "float8_e4m3fn" else save_dtype]

    np.float8_e4m3fn = tiny.DTYPES["float8_e4m3fn"]  # type: ignore[attr-defined] # asked for it
    original: Callable[..., Any] = safetensors.safe_open
    safetensors.safe_open = RoundingFile  # type: ignore[assignment, misc]


def convert(
    case: str,
    scan: bool,
    dtype: str,
    save_dtype: str,
    out: Path,
    words: list[str],
    adapter: str | None = None,
) -> None:
    """Writes the checkpoint of a case, or an adapter alone, and converts it."""
    model_name = tiny.CASES[case].model_name
    overrides = dict(word.split("=", 1) for word in words)
    if adapter:
        written = tiny.write_adapter(case, adapter, out / "adapter", dtype)
        source = f"hf_lora_adapter_path={written}"
    else:
        source = f"--hf_model_path={tiny.write(case, out / 'hf', dtype)}"
    config = dict(tiny.CASES[case].config)
    # MaxText's mapping asks for as many layers as this says, and refuses another count.
    if layers := overrides.get("base_num_decoder_layers"):
        counted = tiny.CASES[case].words["base_num_decoder_layers"]
        config["num_hidden_layers"] = int(layers) * (config["num_hidden_layers"] // counted)
    lend_model_config(model_name, config)
    if not adapter and (model_name, scan) in REPAIRS:  # adapters need none
        _, repair = REPAIRS[model_name, scan]
        repair(model_name)
    stand_in_for_torch("float32" if adapter else save_dtype)  # adapters are rounded at the end
    gc.collect = lambda *_: 0  # MaxText collects once per leaf, 0.4 s each.

    sys.argv = [
        "to_maxtext",
        *tiny.maxtext_words(case, scan, **overrides),
        f"base_output_directory={out.resolve()}",
        "run_name=oracle",
        "hardware=cpu",
        "skip_jax_distributed_system=True",
        "attention=dot_product",
        "per_device_batch_size=1",
        "max_target_length=32",
        source,
        f"--save_dtype={save_dtype}",
        # MaxText refuses to load the tensors of multimodal models lazily.
        f"--lazy_load_tensors={'use_multimodal' not in tiny.CASES[case].words}",
    ]
    runpy.run_module(
        "maxtext.checkpoint_conversion.to_maxtext", run_name="__main__", alter_sys=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Converts a tiny checkpoint with MaxText itself.")
    parser.add_argument("case", choices=tiny.CASES)
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--scan", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", choices=tiny.DTYPES, default="bfloat16")
    parser.add_argument("--save_dtype", choices=tiny.DTYPES, default="bfloat16")
    parser.add_argument("--adapter", choices=tiny.ADAPTERS)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_intermixed_args()
    # Neither the network nor an accelerator is needed; libraries must not look for one.
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    convert(args.case, args.scan, args.dtype, args.save_dtype, args.out, args.words, args.adapter)


if __name__ == "__main__":
    main()
