"""What a report shows of an evaluation, as plain data: matrices, scores by label, calibration, the worst errors.

Everything here is JSON: texts, whole numbers, finite numbers, lists, objects. Texts are cut; a report is no data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import numpy as np

    Array: TypeAlias = np.ndarray[Any, Any]

TEXT = 420  # characters of a row's text
WORDS = 60  # of a sentence whose tags are shown
ERRORS, PICTURES = 12, 24  # of the worst rows: texts, pictures
POINTS = 600  # of a scatter plot
FEW = 8  # values that are no histogram yet
BINS = 10  # of a reliability diagram and of a histogram


def cut(text: Any, most: int = TEXT) -> str:
    """A text on one line, with an ellipsis where it was cut."""
    flat = " ".join(str(text).split())
    return flat if len(flat) <= most else flat[: most - 1].rstrip() + "…"


def around(text: str, begin: int, end: int, most: int = TEXT) -> str:
    """The part of a long text that holds what stands from `begin` to `end`."""
    if len(text) <= most:
        return cut(text, most + 1)
    first = max(0, begin - max(0, most - (end - begin)) // 2)
    first = text.find(" ", first, begin) + 1 or first  # at a word, where one begins before what is to be seen
    piece = text[first : first + most]
    return f"{'…' if first else ''}{' '.join(piece.split())}{'…' if first + most < len(text) else ''}"


def confusion(predicted: Sequence[int], truth: Sequence[int], labels: Sequence[str]) -> dict[str, Any]:
    """How often each label was answered where another was right.

    Returns:
        labels, and the cells that are not 0 as [right, answered, rows].
    """
    import numpy as np

    pairs, counts = np.unique(np.stack([truth, predicted], -1).astype(int), axis=0, return_counts=True)
    cells = [[int(right), int(said), int(rows)] for (right, said), rows in zip(pairs, counts, strict=True)]
    return {"labels": list(labels), "cells": cells}


def per_label(predicted: Array, truth: Array, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and rows of each label that occurs.

    Args:
        predicted, truth: class numbers, shape (rows,); or 0 and 1, shape (rows, labels).
        labels: their names.
    """
    import numpy as np
    from sklearn.metrics import precision_recall_fscore_support

    columns = list(range(len(labels)))
    scores = precision_recall_fscore_support(truth, predicted, labels=columns, average=None, zero_division=0.0)
    said = predicted.sum(0) if predicted.ndim > 1 else np.bincount(predicted, minlength=len(labels))
    return [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n), "said": int(s)}
        for name, p, r, f, n, s in zip(labels, *scores, said[: len(labels)], strict=True)
        if n or s
    ]


def calibration(confidence: Array, right: Array, of: str) -> dict[str, Any]:
    """How often answers of a certainty were right, in ten bins, and the expected calibration error.

    Args:
        confidence: probability that each answer was given with, shape (answers,).
        right: whether it was right, shape (answers,).
        of: what is counted.

    Source: Guo et al., 2017, equations 2 and 3.
    """
    import numpy as np

    places = np.minimum((confidence * BINS).astype(int), BINS - 1)
    bins = []
    error = 0.0
    for place in range(BINS):
        inside = places == place
        rows = int(inside.sum())
        if rows:
            mean, share = float(confidence[inside].mean()), float(right[inside].mean())
            error += rows / len(confidence) * abs(mean - share)
            bins.append({"bin": place, "confidence": mean, "accuracy": share, "rows": rows})
    return {"ece": error, "bins": bins, "of": of, "rows": len(confidence)}


def scatter(predicted: Array, truth: Array) -> dict[str, Any]:
    """Points (right, predicted), evenly picked along the right values where there are too many."""
    import numpy as np

    order = np.argsort(truth, kind="stable")
    picks = order[np.linspace(0, len(order) - 1, min(len(order), POINTS)).astype(int)]
    return {"points": [[_short(truth[pick]), _short(predicted[pick])] for pick in picks], "rows": len(order)}


def histogram(values: Iterable[float], unit: str, bins: int = 16) -> dict[str, Any] | None:
    """Counts of values in bins of one width; None for a handful of values."""
    import numpy as np

    found = np.asarray([value for value in values if math.isfinite(value)], dtype=float)
    if len(found) < FEW:
        return None
    whole = bool((found == found.astype(int)).all())
    span = float(found.max() - found.min())
    counts, edges = np.histogram(found, min(bins, max(1, int(span))) if whole else bins)
    quantiles = {name: _short(np.quantile(found, q)) for name, q in (("median", 0.5), ("95 %", 0.95))}
    return {
        "counts": counts.tolist(),
        "edges": [_short(edge) for edge in edges],
        "unit": unit,
        "quantiles": {"least": _short(found.min()), **quantiles, "most": _short(found.max())},
    }


def worst(badness: Array, bad: Array, make: Callable[[int], Mapping[str, Any]], most: int = ERRORS) -> dict[str, Any]:
    """The worst rows.

    Args:
        badness: the greater the worse, shape (rows,).
        bad: which rows count as errors at all, shape (rows,).
        make: what is shown of a row.
        most: how many are shown.
    """
    import numpy as np

    order = [int(row) for row in np.argsort(-badness, kind="stable") if bad[row]]
    return {"count": len(order), "rows": len(badness), "shown": [dict(make(row)) for row in order[:most]]}


def per_row(nats: Array, learnt: Array) -> Array:
    """The mean loss of each row in nats a token; 0 for rows without tokens."""
    import numpy as np

    return np.where(learnt > 0, nats / np.maximum(learnt, 1), 0.0)


def likely(found: Sequence[Array], make: Callable[[int], Mapping[str, Any]]) -> dict[str, Any]:
    """What is shown of a language model: how the loss is spread over the rows, and the rows that surprised it most.

    Args:
        found: nats, hits, learnt tokens of each row.
        make: what is shown of a row, beside its loss.
    """
    losses = per_row(found[0].astype("float64"), found[2])
    shown = worst(losses, found[2] > 0, lambda row: {"loss": _short(losses[row]), **make(row)})
    return {
        "spread": histogram(losses[found[2] > 0].tolist(), "loss of a row, nats a token"),
        "errors": {**shown, "title": "Rows that surprised the model most", "count": None},
    }


def _short(value: Any) -> float:
    """A number with five digits, for a picture."""
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else 0.0
