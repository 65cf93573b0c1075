"""Lists the contents of a checkpoint from its metadata: reads no tensor, does not start JAX."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from etils import epath

from maxconv.errors import UserError
from maxconv.sources import FileSource, open_source
from maxconv.sources.orbax import Item, Stored, find_items, open_item
from maxconv.targets.place import UNFINISHED_WORDS
from maxconv.text import size, table

# The numbers of layers and experts in a name: `layers.7.`, `layers_7.`; not the 0 of `wi_0`.
_NUMBER = re.compile(r"(?<=\.)[0-9]{1,9}(?=\.|$)|(?<=layers_)[0-9]{1,9}")
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
)


def describe(path: str | epath.Path) -> str:
    """A table of a checkpoint's tensors: Hugging Face's, or Orbax' in any of its directories.

    Raises:
        UserError: if it is neither, or damaged.
    """
    path = str(path)
    if path.startswith("hf://"):  # Orbax checkpoints on the Hub are not inspected
        with open_source(path) as source:
            return _describe_source(source)
    if items := find_items(epath.Path(path)):
        return "\n\n".join(_describe_item(open_item(item)) for item in items)
    directory = epath.Path(path)
    if directory.is_dir() and not _looks_like_hugging_face(directory):
        names = [path.name for path in directory.iterdir()]
        unfinished = [n for n in names if "orbax-checkpoint-tmp" in n or n == UNFINISHED_WORDS]
        raise UserError(
            f"{path} contains only {unfinished[0]}, an unfinished save; save it again."
            if unfinished
            else f"{path} is not a checkpoint: it has neither Hugging Face files (config.json, "
            "*.safetensors) nor Orbax files (_METADATA); give the directory that contains them."
        )
    with open_source(path) as source:
        return _describe_source(source)


def _describe_item(item: Item) -> str:
    storage = f"{'OCDBT' if item.ocdbt else 'files'}, zarr{3 if item.zarr3 else 2}"
    step = item.directory.parent.name
    lines = [
        f"Orbax checkpoint {item.directory}",
        f"  step {step}, {storage}" if step.isdigit() else f"  {storage}",
    ]
    lines += [f"  {key}={value}" for key, value in item.custom.items()]
    lines += [f"  saved from mesh {mesh}" for mesh in item.meshes]
    lines += [f"  {name}: {kind}, without arrays" for name, kind in item.others.items()]
    return "\n".join([*lines, "", *_tensors(item.arrays.values())])


def _describe_source(source: FileSource) -> str:
    stated = source.config.get("architectures")
    named = [str(name) for name in stated] if isinstance(stated, list) else []
    sizes = [f"{key}={source.config[key]}" for key in _SIZES if key in source.config]
    files = source.files
    more = f" to {files[-1]}" if len(files) > 1 else ""
    lines = [
        f"Hugging Face checkpoint {source.root}",
        *([f"  revision {source.revision}"] if source.revision else []),
        f"  {', '.join(named) or 'no architecture named'}: {', '.join(sizes)}",
        *([f"  {len(files)} files, {files[0]}{more}"] if files else []),
        *(f"  {notice}" for notice in source.notices),
    ]
    stored = [
        Stored(info.name, info.shape, info.dtype.name, info.nbytes)
        for info in source.stored.values()
    ]
    return "\n".join([*lines, "", *_tensors(stored)])


def _looks_like_hugging_face(directory: epath.Path) -> bool:
    names = [child.name for child in directory.iterdir()]
    return any(n == "config.json" or n.endswith((".safetensors", ".index.json")) for n in names)


def _tensors(tensors: Iterable[Stored]) -> list[str]:
    """One line for all tensors whose names differ only in numbers, and the totals."""
    tensors = list(tensors)
    rows = []
    for name, same in fold(tensors):
        first, times = same[0], f"{len(same)} x " if len(same) > 1 else ""
        chunk = f"chunk {first.chunk}" if first.chunk is not None else ""
        nbytes = size(sum(t.nbytes for t in same))
        rows.append((name, f"{times}{first.shape}", first.dtype, nbytes, first.spec, chunk))
    elements = sum(math.prod(t.shape) for t in tensors)
    total = size(sum(t.nbytes for t in tensors))
    return [
        *table(rows).splitlines(),
        "",
        f"{len(tensors)} tensors, {elements:,} elements, {total}",
    ]


def fold(tensors: Iterable[Stored]) -> list[tuple[str, list[Stored]]]:
    """Groups tensors that differ only in the numbers in their names.

    Returns:
        A name for each group, such as `layers.{0..31}.mlp`, and its members; a group whose numbers
        are not all the combinations of a few is left as single tensors.
    """
    groups: defaultdict[tuple[object, ...], list[Stored]] = defaultdict(list)
    for t in tensors:
        alike = _NUMBER.sub("#", t.name), t.shape, t.dtype, t.chunk, t.spec
        groups[alike].append(t)
    folded = []
    for same in groups.values():
        numbers = [[int(n) for n in _NUMBER.findall(t.name)] for t in same]
        axes = [sorted(set(column)) for column in zip(*numbers, strict=True)]
        if len(same) == 1 or math.prod(map(len, axes)) != len(same):
            folded += [(t.name, [t]) for t in same]
            continue
        texts = iter(_ranges(axis) for axis in axes)
        folded.append((_NUMBER.sub(lambda _, texts=texts: next(texts), same[0].name), same))
    return folded


def _ranges(numbers: Sequence[int]) -> str:
    """`{0..3,7}`; a single number as it is."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return texts[0] if len(numbers) == 1 else "{" + ",".join(texts) + "}"
