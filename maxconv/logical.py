"""The tensors that a family's table speaks of, as expressions over those that a checkpoint holds.

Checkpoints of one architecture come under several names. What is read here as
`model.layers.0.mlp.up_proj.weight` may lie there as `language_model.model.layers.0...`: the table
is written once, in names of its own, and a family lists the others.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from maxconv.algebra import Expr, Tensor
from maxconv.errors import UserError
from maxconv.families import Family
from maxconv.sources import Source


@dataclass(frozen=True)
class Logical:
    """What a checkpoint holds, by the names of a table; `notices` tell of what was renamed."""

    tensors: Mapping[str, Expr]
    notices: tuple[str, ...] = ()


def logical_tensors(source: Source, family: Family) -> Logical:
    """The tensors of a checkpoint by the names of its family's table.

    Raises:
        UserError: when two tensors would have the same name.
    """
    rename = renamer(family.names)
    found: dict[str, Tensor] = {}
    used: dict[str, str] = {}
    problems = []
    for name, info in source.tensors.items():
        ours, pattern = rename(name)
        if ours in found:
            problems.append(f"{source.root}: {found[ours].name} and {name} are the same tensor.")
        found[ours] = Tensor(name, info.shape)
        if pattern:
            used[pattern] = dict(family.names)[pattern]
    if problems:
        raise UserError(problems)
    return Logical(found, tuple(f"tensors {a}* are read as {b}*" for a, b in used.items()))


def renamer(names: Sequence[tuple[str, str]]) -> Callable[[str], tuple[str, str | None]]:
    """The function that gives a tensor's name in the table, and the pattern that was used if any.

    Args:
        names: pairs of patterns, the first that fits is used: how a name begins, and how it begins
            in the table. A `*` stands for a part without dots, which is kept.
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
