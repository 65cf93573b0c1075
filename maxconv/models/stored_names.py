"""What checkpoints hold beside weights, and what their names have before those of the table."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import translate
from functools import cache

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

Renamer = Callable[[str], tuple[str, str | None]]

# What is computed from config.json, of a value model, or of activations that are quantised while a
# model serves: in any family.
NO_WEIGHTS = (
    "*.inv_freq",
    "*.cos_cached",
    "*.sin_cached",
    "*.masked_bias",
    "v_head.*",
    "*.v_head.*",
    "*.k_scale",
    "*.v_scale",
    "*.q_scale",
    "*.kv_scale",
    "*.k_proj.output_scale",
    "*.v_proj.output_scale",
    "*.activation_scale",
    "*.input_scale",
    "*.input_scale_ub",
    "*.input_zero_point",
    "*.input_global_scale",
)
_NO_WEIGHT = re.compile("|".join(f"({translate(pattern)})" for pattern in NO_WEIGHTS))
# Parts of names that wrappers of a module leave in them: torch.compile, FSDP, checkpointing.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def no_weights(names: Iterable[str]) -> dict[str, list[str]]:
    """The tensors that are no weights, by what they are called at the end of their names."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _NO_WEIGHT.fullmatch(name):
            found.setdefault(NO_WEIGHTS[(match.lastindex or 1) - 1].strip("*."), []).append(name)
    return found


def left_out(found: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A sentence about them."""
    if found:
        kinds = ", ".join(f"{len(names)} {kind}" for kind, names in found.items())
        yield f"left out, as they are no weights: {kinds}"


def unwrapped(names: Sequence[tuple[str, str]], stored: Iterable[str]) -> tuple[Renamer, list[str]]:
    """The function that gives a tensor's name in the table, and sentences about what it takes off.

    A prefix that the embedding table has before its name, or lacks, is one that all tensors have or
    lack.

    Args:
        names: of the family, see `renamer`.
        stored: the names in the checkpoint.
    """
    rename, seen = renamer(names), list(stored)
    bare = {name: _bare(name) for name in seen}
    notices = [
        f"{part}* in names of tensors is left out"
        for part in _WRAPPERS
        if any(part in name for name in seen)
    ]
    before, missing = _prefix(rename, names, bare.values())
    if before:
        notices.append(f"names of tensors are read without {before} before them")
    if missing:
        notices.append(f"names of tensors are read with {missing} before them")

    def canonical(name: str) -> tuple[str, str | None]:
        name = _bare(name)
        if before:
            name = name.removeprefix(before)
        elif missing and not name.startswith((missing, HEAD.removesuffix("weight"))):
            name = missing + name
        return rename(name)

    return canonical, notices


def _bare(name: str) -> str:
    for part in _WRAPPERS:
        name = name.replace(part, "")
    return name


def _prefix(
    rename: Renamer, names: Sequence[tuple[str, str]], stored: Iterable[str]
) -> tuple[str, str]:
    """What the table's name has before it in a checkpoint, and what it lacks."""
    stored = list(stored)
    for wanted in (EMBEDDING, HEAD):
        if any(rename(name)[0] == wanted for name in stored):
            return "", ""
        anchors = sorted((wanted, *_anchors(names, wanted)), key=len, reverse=True)
        for name in stored:
            for anchor in anchors:
                if name.endswith(f".{anchor}"):
                    return name.removesuffix(anchor), ""
                if "." in name and anchor.endswith(f".{name}"):
                    return "", anchor.removesuffix(name)
    return "", ""


def _anchors(names: Sequence[tuple[str, str]], wanted: str) -> Iterator[str]:
    """The names that a family's checkpoints have for a tensor of the table."""
    for theirs, ours in names:
        if "*" not in theirs and ours and wanted.startswith(ours):
            yield theirs + wanted.removeprefix(ours)


def renamer(names: Sequence[tuple[str, str]]) -> Renamer:
    """A function that maps a tensor's name to its canonical name, and the pattern used, if any.

    Args:
        names: pairs of a prefix and its canonical form; the first that matches is used. A `*`
            stands for one part without dots, which is kept.
    """
    compiled = [(_regex(theirs), theirs, ours.replace("*", "{}")) for theirs, ours in names]

    def rename(name: str) -> tuple[str, str | None]:
        for regex, theirs, ours in compiled:
            if match := regex.match(name):
                return ours.format(*match.groups()) + name[match.end() :], theirs
        return name, None

    return rename


@cache
def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile("([^.]+)".join(re.escape(part) for part in pattern.split("*")))
