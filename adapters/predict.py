"""Answers and numbers from an adapted model, without a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from adapters.contracts import Adapted
from adapters.data import one
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

BATCH = 32  # rows per forward pass


def logits_of(
    adapted: Adapted, prepared: Dataset, *, batch_size: int = BATCH, device: str | None = None
) -> np.ndarray[Any, Any]:
    """The model's outputs for prepared rows, in their order: shape (rows, ...), float32.

    Rows of like length go together, so that little is padded.
    """
    import numpy as np
    import torch

    model = adapted.model
    if batch_size < 1:
        raise RequestError(
            message("a wrong value", where="batch_size", expected="a whole number > 0", found=batch_size)
        )
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    was_training = model.training
    model.train(False)
    order = np.argsort(prepared["length"], kind="stable")[::-1]
    answers: list[Any] = [None] * len(prepared)
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                picks = order[start : start + batch_size]
                features = [prepared[int(index)] for index in picks]
                batch = adapted.task.collate(features, model)
                batch.pop("row", None)
                batch.pop("labels", None)
                outputs = model(**{name: value.to(model.device) for name, value in batch.items()})
                for index, row in zip(picks, outputs.logits.float().cpu().numpy(), strict=True):
                    answers[int(index)] = row
    finally:
        model.train(was_training)
    return np.stack(answers)


def predict(
    adapted: Adapted,
    rows: Sequence[str | Mapping[str, Any]] | Any,
    *,
    batch_size: int = BATCH,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """What the model answers, row by row, in their order.

    Args:
        adapted: the adapted model.
        rows: texts, dicts with the task's columns, a `Dataset`, or a file.
        batch_size: rows per forward pass.
        device: where to compute; None leaves the model where it is.

    Returns:
        One dict a row, e.g. {"label": "pos", "score": 0.98}.

    Raises:
        DataError: a row that is not what the task takes, with its number.
    """
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        rows = [{"text": row} if isinstance(row, str) else row for row in rows]
    source = one(rows)
    prepared, _ = adapted.task.prepare(source, adapted.processor, adapted.model, labelled=False)
    return adapted.task.decode(logits_of(adapted, prepared, batch_size=batch_size, device=device))


def evaluate(adapted: Adapted, dataset: Any, *, batch_size: int = BATCH) -> dict[str, float]:
    """The task's metrics and the loss over labelled rows.

    Args:
        adapted: the adapted model.
        dataset: rows with labels, in any form that `predict` takes.

    Raises:
        DataError: rows without labels, or with unknown ones.
    """
    import numpy as np
    import torch

    source = one(dataset)
    prepared, _ = adapted.task.prepare(source, adapted.processor, adapted.model, labelled=True)
    logits = logits_of(adapted, prepared, batch_size=batch_size)
    labels = np.asarray(prepared["labels"])
    wanted = torch.float32 if labels.dtype.kind == "f" else torch.long
    task = adapted.record.task or adapted.task
    loss = task.loss(SimpleNamespace(logits=torch.as_tensor(logits)), torch.as_tensor(labels, dtype=wanted))
    return {"loss": float(loss), **adapted.task.metrics(logits, labels)}
