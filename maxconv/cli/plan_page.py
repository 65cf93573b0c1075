"""A plan as one HTML page with diagrams: `maxconv plan --report=plan.html`."""

import html
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from maxconv.algebra import Box
from maxconv.cli.plan_text import path_text, source_text
from maxconv.jobs.prepare import Job
from maxconv.planning.estimates import device_estimate, held_nbytes, host_estimate
from maxconv.planning.placement import device_boxes
from maxconv.planning.plan import LeafPlan, Plan
from maxconv.planning.tpus import Slice
from maxconv.text import MARK, duration, printable, size

_LEAVES = 12  # drawn: the largest
_WIDTH = 880
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 900px; margin: 2em auto; }
h1 { font-size: 1.5em; margin-bottom: 0 } h2 { font-size: 1.1em; margin: 2em 0 .3em }
.facts { display: flex; flex-wrap: wrap; gap: 2.5em; margin: 1.5em 0 } .facts b { display: block;
font-size: 1.6em; font-weight: 600 } p { margin: .3em 0; color: #555 }
svg { font: 12px system-ui, sans-serif; width: 100% } text { fill: #333 } li { color: #555 }
"""


def plan_page(job: Job, on: Slice | None = None) -> str:
    """The page: key figures, then reads per host, who has what, host memory, the largest leaves.

    `on`: the slice that the plan is for, with --tpu_type.
    """
    plan, readable = job.plan, source_text(job.source)
    reads = [plan.read_nbytes(process) for process in plan.processes]
    name = job.model.architecture or job.model.family.architectures[0]
    mesh = " x ".join(f"{axis}={n}" for axis, n in plan.mesh.shape.items() if n > 1)
    slices = f"{len(reads) // on.hosts} x {on.name}" if on else ""
    where = f"{slices}, {mesh}" if on else mesh or "one device"
    body = [
        f"<h1>{escape(name)} on {escape(where)}</h1><p>{escape(readable)}</p>",
        '<div class="facts">',
        *(f"<div><b>{escape(n)}</b>{escape(what)}</div>" for n, what in _facts(job, reads, on)),
        "</div>",
        "<h2>Bytes that each host reads</h2>",
        _hosts(reads),
        "<h2>Who has what</h2><p>Each row is a leaf, each column a host, left to right as above. "
        "The colour shows which part of the leaf the host makes: hosts of the same colour make the "
        "same part. A host reads the tensors of its part itself (direct), or an equal share of "
        "their rows, which the chips then exchange over the mesh axes that are named.</p>",
        _who(plan),
        "<h2>Host memory, leaf by leaf</h2><p>Data that is read ahead, being computed and being "
        "written, in the order of the save.</p>",
        _memory(plan, job.window),
        "<h2>Largest leaves</h2>",
        _largest(plan),
        *(["<h2>Notes</h2><ul>", *_items(job.notices), "</ul>"] if job.notices else []),
    ]
    title = f"<title>{escape(name)}: a plan</title>"
    meta = f'<meta charset="utf-8"><meta name="generator" content="{MARK}">'
    head = f'<!doctype html><html lang="en">{meta}{title}<style>{_STYLE}</style>'
    return "\n".join([head, *body, "</html>\n"])


def _facts(job: Job, reads: Sequence[int], on: Slice | None) -> Iterator[tuple[str, str]]:
    """The key figures, each with what it is; `reads`: bytes that each process reads."""
    plan = job.plan
    over = sum(reads) - plan.needed_nbytes
    host, device = host_estimate(plan, job.window, job.source), device_estimate(plan, job.window)
    yield size(sum(reads)), f"read, {100 * over / plan.needed_nbytes:.0f} % more than needed"
    yield size(plan.output_nbytes), f"written, in {len(plan.leaves)} leaves"
    yield str(len(reads)), f"hosts, {plan.mesh.size} devices"
    yield size(host), "memory per host at most" + _of(on and on.machine.ram)
    yield size(device), "memory per device at most" + _of(on and on.kind.hbm)
    if on:
        written = plan.output_nbytes / len(reads)
        seconds = max(max(reads), written) / on.network
        rate = f"{on.network * 8 / 1e9:.0f} Gbit/s"
        yield duration(seconds), f"network time at least, at {rate} per host"


def escape(text: str) -> str:
    """Text in HTML, as `printable` has it: a page with half a surrogate pair cannot be written."""
    return html.escape(printable(text))


def _of(nbytes: int | None) -> str:
    return f", of {size(nbytes)}" if nbytes else ""


def _items(lines: Iterable[str]) -> list[str]:
    return [f"<li>{escape(line)}</li>" for line in lines]


def _svg(height: float, marks: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(marks)}</svg>'


def _rect(x: float, y: float, w: float, h: float, fill: str, title: str, opacity: float = 1) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.2f}" width="{max(w, 0.1):.2f}" height="{h:.2f}" fill="{fill}" '
        f'fill-opacity="{opacity:.2f}"><title>{escape(title)}</title></rect>'
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _hosts(reads: Sequence[int]) -> str:
    """A bar a host; the mean as a line."""
    top, most, mean = 16, max(max(reads), 1), sum(reads) / len(reads)
    width = _WIDTH / len(reads)
    gap = min(2, width / 5)
    bars = [
        _rect(i * width, top + 100 * (1 - n / most), width - gap, 100 * n / most, "#4878a8",
              f"host {i}: {size(n)}")
        for i, n in enumerate(reads)
    ]  # fmt: skip
    y = top + 100 * (1 - mean / most)
    line = f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#c44" />'
    said = f"mean {size(mean)}, most {size(most)}, least {size(min(reads))}"
    ends = [_text(0, 132, "host 0"), _text(_WIDTH, 132, f"host {len(reads) - 1}", "end")]
    return _svg(138, [*bars, line, _text(0, 11, said), *ends])


def _who(plan: Plan) -> str:
    """Leaves by hosts, in the colour of the part of the leaf that is on the host."""
    left, row, right = 330, 18, 270
    width = (_WIDTH - left - right) / len(plan.processes)
    marks = []
    leaves = sorted(plan.leaves, key=lambda leaf: -leaf.nbytes)[:_LEAVES]
    for i, leaf in enumerate(leaves):
        boxes: dict[int, set[Box]] = {}
        for device, box in device_boxes(leaf.sharding, leaf.shape).items():
            boxes.setdefault(device.process_index, set()).add(box)
        parts = [tuple(sorted(boxes[process])) for process in plan.processes]
        ranks = {part: rank for rank, part in enumerate(sorted(set(parts)))}
        marks.append(_text(left - 8, i * row + 13, _short(leaf), "end"))
        ways = dict.fromkeys(read.way for step in leaf.steps for read in step.recipe.reads)
        said = f"{len(ranks)} parts, {'; '.join(ways)}"
        marks.append(_text(_WIDTH - right + 8, i * row + 13, said))
        at = 0
        for part, hosts in groupby(parts):
            n = len(list(hosts))
            hue = 220 - 190 * ranks[part] / max(len(ranks) - 1, 1)
            said = f"{leaf.name}, hosts {at} to {at + n - 1}: part {ranks[part]}"
            fill = f"hsl({hue:.0f} 45% 55%)"
            marks.append(_rect(left + at * width, i * row, n * width, row - 3, fill, said))
            at += n
    return _svg(len(leaves) * row, marks)


def _short(leaf: LeafPlan) -> str:
    name = path_text(leaf)
    return name if len(name) <= 46 else "\u2026" + name[-45:]


def _memory(plan: Plan, window: int) -> str:
    """A host's memory over the save: bars as wide as their leaf is large."""
    total, top = plan.output_nbytes, 16
    held = [held_nbytes(leaf, window) for leaf in plan.leaves]
    most, x, marks = max(held), 0.0, []
    for leaf, nbytes in zip(plan.leaves, held, strict=True):
        w, h = _WIDTH * leaf.nbytes / total, 100 * nbytes / most
        said = f"{leaf.name}: {size(nbytes)}"
        marks.append(_rect(x, top + 100 - h, w, h, "#7aa874", said))
        x += w
    y = top + 100 * (1 - window / most)
    line = f'<line x1="0" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#333" />'
    said = f"most {size(most)}; below the line: the window, {size(window)}"
    ends = [_text(0, 132, "first leaf"), _text(_WIDTH, 132, "last leaf", "end")]
    return _svg(138, [*marks, line, _text(0, 11, said), *ends])


def _largest(plan: Plan) -> str:
    left, row = 330, 20
    leaves = sorted(plan.leaves, key=lambda leaf: -leaf.nbytes)[:_LEAVES]
    marks = []
    for i, leaf in enumerate(leaves):
        w = (_WIDTH - left - 190) * leaf.nbytes / leaves[0].nbytes
        marks.append(_text(left - 8, i * row + 13, _short(leaf), "end"))
        marks.append(_rect(left, i * row, w, row - 4, "#b08a4a", leaf.name))
        shape = f"{size(leaf.nbytes)}  {'x'.join(map(str, leaf.shape))}"
        marks.append(_text(left + w + 6, i * row + 13, shape))
    return _svg(len(leaves) * row, marks)
