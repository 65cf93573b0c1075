"""The models that maxconv knows, as tables to read."""

from collections.abc import Iterable, Sequence

from maxconv.config.tables import known_models
from maxconv.families import BY_ARCHITECTURE, FAMILIES, Family
from maxconv.text import table

_COLUMNS = ("model_name", "Hugging Face", "architecture", "layers", "notes")


def families_text() -> str:
    """A line for each model, by family."""
    rows = [
        (name, hf_id, architecture, _layers(family), _notes(family))
        for family in FAMILIES
        for architecture in family.architectures
        for name, hf_id in _models(family, architecture)
    ]
    return table(rows, _COLUMNS)


def families_markdown() -> str:
    """The README's table: a line for each architecture."""
    head = ("architecture in `config.json`", "`model_name`", "layers", "notes")
    rows = (
        (architecture, ", ".join(n for n, _ in _models(f, architecture)), _layers(f), _notes(f))
        for architecture, families in BY_ARCHITECTURE.items()
        for f in families
    )
    return "\n".join(map(_markdown_row, [head, ["---"] * len(head), *rows]))


def _models(family: Family, architecture: str) -> Iterable[tuple[str, str]]:
    """MaxText's names of a family's models of an architecture, and where they are published."""
    made = (architecture, family.decoder_block)
    models = known_models().items()
    return [
        (name, f["hf_id"]) for name, f in models if (f["architecture"], f["decoder_block"]) == made
    ]


def _layers(family: Family) -> str:
    return "scanned or unscanned" if family.scans else "unscanned (scan_layers=False)"


def _notes(family: Family) -> str:
    encoders = [
        ("vision encoder with use_multimodal=True", family.encoders),
        ("audio encoder with use_audio=True", family.audio_patterns),
    ]
    return ", ".join(note for note, patterns in encoders if patterns)


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("  ", " ")
