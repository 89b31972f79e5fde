"""What the rows of a run are, in numbers: rows and labels of each part, lengths of the training rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters import findings
from adapters.labels import named, names_in

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = 200  # names that are counted one by one


def census(parts: Mapping[str, Any], prepared: Any, problem: str = "") -> dict[str, Any]:
    """Rows and label counts of each part, and how long the training rows are as the model reads them.

    Args:
        parts: raw rows by part; of a stream, which has no length, nothing is counted.
        prepared: the training rows as model inputs.
        problem: of a classification: "multi-label" cells hold several names, those of a "regression" numbers.
    """
    values = problem == "regression"
    sets = {name: rows for name, rows in parts.items() if hasattr(rows, "__len__")}
    counts = {name: Counter() if values else _labels(rows, problem == "multi-label") for name, rows in sets.items()}
    streamed = not hasattr(prepared, "__len__")
    names = sorted({label for found in counts.values() for label in found})
    measured = not streamed and "length" in prepared.column_names
    lengths = [int(length) for length in prepared["length"]] if measured else []
    numbers = None
    if values and not streamed:
        numbers = findings.histogram(map(float, prepared["labels"]), "the number to be predicted")
    return {
        "parts": {name: len(rows) if name in sets else None for name, rows in parts.items()},
        "inputs": None if streamed else len(prepared),
        "labels": {name: {label: found[label] for label in names} for name, found in counts.items()}
        if 0 < len(names) <= LABELS
        else {},
        "values": numbers,
        "lengths": findings.histogram(lengths, "tokens of a training row") if max(lengths, default=1) > 1 else None,
    }


def _labels(rows: Dataset, many: bool) -> Counter[str]:
    """The names in a column of labels or tags."""
    found: Counter[str] = Counter()
    column = next((name for name in ("label", "tags") if name in rows.column_names), None)
    for number, cell in enumerate(rows[column] if column else ()):
        value = named(rows, cell, column or "")
        if many:
            value = names_in(value, number, (), many=True, check=False)
        found.update(map(str, value) if isinstance(value, list) else [str(value)])
    return found
