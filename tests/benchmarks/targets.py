"""What a conversion is to take, and the table that says whether it does."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

OURS, VERIFIED, MAXTEXT = "maxconv", "maxconv, verified", "MaxText"
COPY, ORBAX, FOUR = "cp and sync", "Orbax load and save", "maxconv, 4 processes"
LARGE = 4  # GiB

Figures = Mapping[str, Mapping[str, Sequence[float]]]
"""Of each side, the values of each figure, such as one a run."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A bound on a figure of a side of ours, or on how many times another side's it is."""

    of: str
    unit: str
    at_most: Fraction | float
    side: str = OURS
    beside: str | None = None
    counts: Callable[[Sequence[float]], float] = statistics.median
    """What is compared, of several values."""
    models: tuple[float, float] = (0, math.inf)
    """From so many GiB to so many."""

    @property
    def bound(self) -> str:
        most = str(self.at_most) if isinstance(self.at_most, Fraction) else f"{self.at_most:g}"
        return f"at most {most} of {self.beside}" if self.beside else f"at most {most} {self.unit}"

    def row(self, model: str, figures: Figures) -> list[str]:
        """The cells below `HEAD`."""
        ours = figures[self.side][self.of]
        theirs = figures.get(self.beside, {}).get(self.of) if self.beside else None
        cells = [model, self.of, self.bound, f"{spread(ours)} {self.unit}"]
        if self.beside and theirs is None:
            return [*cells, "not run", "", ""]
        value = self.counts(ours) / (self.counts(theirs) if theirs else 1)
        shown = [f"{spread(theirs)} {self.unit}", ratio(value)] if theirs else ["", ""]
        return [*cells, *shown, "yes" if value <= self.at_most else "NO"]


HEAD = ["model", "figure", "target", "maxconv", "beside it", "ratio", "met"]
TARGETS = (
    Target(of="wall", unit="s", at_most=Fraction(1, 3), beside=MAXTEXT, models=(0, LARGE)),
    Target(of="wall", unit="s", at_most=Fraction(1, 4), beside=MAXTEXT, models=(LARGE, math.inf)),
    Target(of="wall", unit="s", at_most=1.25, beside=COPY, models=(LARGE, math.inf)),
    Target(of="wall", unit="s", at_most=1.1, beside=ORBAX),
    Target(of="CPU per GiB", unit="s", at_most=Fraction(1, 4), beside=MAXTEXT),
    Target(of="first tensor byte", unit="s", at_most=5, side=VERIFIED),
    Target(of="peak memory", unit="GiB", at_most=2, side=VERIFIED, counts=max),
    Target(of="off an even share", unit="%", at_most=5, side=FOUR, counts=max),
)


def rows(
    model: str, gib: float, figures: Figures, targets: Iterable[Target] = TARGETS
) -> list[list[str]]:
    """A row for each target that is one of a model of that size."""
    held = (target for target in targets if target.models[0] <= gib < target.models[1])
    return [target.row(model, figures) for target in held]


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """In Markdown, its columns in line."""
    lines = [list(head), *map(list, body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum."""
    three = (min(values), statistics.median(values), max(values))
    return " / ".join(f"{value:.1f}" if value >= 3 else f"{value:.2f}" for value in three)


def ratio(value: float) -> str:
    return f"{value:.2f}" if value > 0.5 else f"{value:.2f} = 1/{1 / value:.1f}"
