"""Answers and numbers from an adapted model, without a trainer."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adapters import exchange, processes, ranks
from adapters.contracts import Adapted, Mixing, Task
from adapters.data import at, one
from adapters.errors import RequestError, message
from adapters.formats import arrange
from adapters.modes import evaluating
from adapters.progress import Job

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.prefix import Prefix

logger = logging.getLogger(__name__)

BATCH = 32  # rows per forward pass


def is_prepared(rows: Any) -> bool:
    """Whether rows have been through the task's `prepare` already."""
    features = getattr(rows, "features", None) or {}
    return all(getattr(features.get(name), "dtype", None) == "int64" for name in ("row", "length"))


def prepared_rows(adapted: Adapted, source: Any, *, labelled: bool) -> Dataset:
    """Model inputs from rows in any form that `predict` takes; remarks are said."""
    if is_prepared(source):
        rows: Dataset = source
        return rows
    return prepared_by(adapted.task, adapted.processor, adapted.model, source, labelled=labelled)


def prepared_by(task: Task, processor: Any, model: PreTrainedModel, source: Any, *, labelled: bool) -> Dataset:
    """The same of raw rows, by a task and what it needs."""
    raw, remark = arrange(one(source), None, task.columns)
    if remark:
        logger.info(remark)
    with Job("preparing", len(raw), "rows"):
        prepared, remarks = task.prepare(raw, processor, model, labelled=labelled)
    for remark in remarks:
        logger.warning(remark)
    return prepared


def over_batches(
    what: str,
    adapted: Adapted,
    prepared: Dataset,
    act: Callable[[dict[str, Any]], tuple[Tensor, ...]],
    batch_size: int = BATCH,
    *,
    together: bool = False,
    numbered: bool = False,
) -> tuple[np.ndarray[Any, Any], ...]:
    """What `act` gives for batches of like lengths, put back into the order of the rows; padded with -100.

    Args:
        what: is done, for the line of progress.
        adapted: whose task makes the batches.
        prepared: the rows.
        act: gets a batch in inference mode, its labels with it where the rows have them; its results have the rows
            first.
        batch_size: rows per forward pass.
        together: all processes of the run call this, and each takes its part of the batches; see `parted`.
        numbered: `act` gets the rows' numbers, too, as "row".
    """
    import numpy as np
    import torch

    from adapters import onload

    if batch_size < 1:
        raise RequestError(
            message("a wrong value", where="batch_size", expected="a whole number > 0", found=batch_size)
        )
    model = adapted.model
    device = onload.device_of(model)
    order = np.argsort(prepared["length"][:], kind="stable")[::-1]
    places: list[int] = []
    parts: list[tuple[np.ndarray[Any, Any], ...]] = []
    starts = range(0, len(order), batch_size)
    several = processes.count() if together and parted(model, len(starts)) else 1
    if several > 1:
        starts = starts[ranks.rank() :: several]
    # What stops one process stops all, once each has passed its part.
    together_or_not = exchange.agreeing() if several > 1 else contextlib.nullcontext()
    job = Job(what, -(-len(order) // several), "rows")
    with together_or_not, evaluating(model), torch.inference_mode(), warnings.catch_warnings(), job:
        if onload.placed(model) is not None:  # of such a model transformers compares with the place of the first weight
            warnings.filterwarnings("ignore", message=r"You are calling \.generate", category=UserWarning)
        for start in starts:
            picks = [int(index) for index in order[start : start + batch_size]]
            batch = adapted.task.collate(at(prepared, picks), model, adapted.processor)
            if not numbered:
                batch.pop("row", None)
            batch = {n: v.to(device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
            parts.append(tuple(array(part) for part in act(batch)))
            places += picks
            job.advance(len(picks))
    if several > 1:
        mine = [joined([part[position] for part in parts]) for position in range(len(parts[0]))]
        places = [int(place) for share in exchange.arrays(np.array(places)) for place in share]
        parts = list(zip(*map(exchange.arrays, mine), strict=True))
    back = np.argsort(places)
    return tuple(joined([part[position] for part in parts])[back] for position in range(len(parts[0])))


def parted(model: PreTrainedModel, batches: int) -> bool:
    """Whether the processes of a run divide so many batches: each has the whole model, and there is one for each."""
    return ranks.joined() and batches >= processes.count() and not any(map(ranks.divided, model.parameters()))


def whole(task: Task, rows: Any) -> Any:
    """Rows with columns; a bare value stands in the task's first one."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        return rows
    first = next(iter(task.columns))
    return [row if row is None or isinstance(row, Mapping) else {first: row} for row in rows]


def array(part: Tensor) -> np.ndarray[Any, Any]:
    """A tensor as numbers on the CPU, at least in float32."""
    found: np.ndarray[Any, Any] = (part.float() if part.is_floating_point() else part).cpu().numpy()
    return found


def joined(parts: Sequence[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Batches one after the other; where later dimensions differ, the shorter ones are filled up with -100."""
    import numpy as np

    shape = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    filled = [
        np.pad(
            part,
            [(0, 0), *((0, most - size) for most, size in zip(shape, part.shape[1:], strict=True))],
            constant_values=-100,
        )
        for part in parts
    ]
    return np.concatenate(filled)


def predict(
    adapted: Adapted | Mixing,
    rows: Sequence[Any] | Any,
    *,
    batch_size: int = BATCH,
    device: str | None = None,
    adapter: Sequence[str] | str | None = None,
) -> list[Any]:
    """What the model answers, row by row, in their order, as the matching transformers pipeline would.

    Args:
        adapted: the adapted model, or a `Shared` backbone with its adapters.
        rows: bare values of the task's first column (texts, images), dicts with the task's columns, a `Dataset`, or
            a file.
        batch_size: rows per forward pass.
        device: where to compute; None leaves the model where it is.
        adapter: of a `Shared` backbone, the adapter of each row by name, or of all rows.

    Returns:
        One answer a row, e.g. {"label": "pos", "score": 0.98}.

    Raises:
        DataError: a row that is not what the task takes, with its number.
        RequestError: unknown adapters, not one a row, or some for a model that has just one.
    """
    if isinstance(adapted, Mixing) or adapter is not None:
        return _mixed(adapted, rows, adapter, batch_size, device)
    if device is not None:
        from adapters import onload

        onload.move(adapted.model, device)
    prepared = prepared_rows(adapted, whole(adapted.task, rows), labelled=False)
    task, model, processor = adapted.task, adapted.model, adapted.processor

    def act(batch: dict[str, Any]) -> tuple[Tensor, ...]:
        return task.answered(model, {name: value for name, value in batch.items() if name != "labels"}, processor)

    found = over_batches("predicting", adapted, prepared, act, batch_size)
    return task.decode(found, prepared, processor)


def _mixed(
    shared: Adapted | Mixing, rows: Any, adapter: Sequence[str] | str | None, batch_size: int, device: str | None
) -> list[Any]:
    if not isinstance(shared, Mixing):
        raise RequestError(
            message("one adapter, and nothing to choose", where="adapter", remedy="Several live on adapters.Shared.")
        )
    if adapter is None:
        raise RequestError(
            message(
                "which adapter each row takes is not said",
                where="adapter",
                remedy="Say adapter=[one name a row], or predict(shared.use(name), rows).",
            )
        )
    if device is not None:
        raise RequestError(
            message("a shared backbone stays where it is", where="device", remedy="Say load={'device_map': ...}.")
        )
    return shared.predict(rows, adapter, batch_size)


@final
@dataclass(frozen=True)
class Measured:
    """An evaluation: its numbers, and what they were made of.

    Attributes:
        numbers: loss and metrics.
        task: that measured.
        found: what it measured of each row, in the order of the rows.
        rows: prepared rows.
    """

    numbers: dict[str, float]
    task: Task
    found: tuple[np.ndarray[Any, Any], ...]
    rows: Dataset


def evaluate(adapted: Adapted, dataset: Any, *, batch_size: int = BATCH) -> dict[str, float]:
    """The task's metrics and the loss over labelled rows.

    Args:
        adapted: the adapted model.
        dataset: rows with labels, in any form that `predict` takes, raw or prepared.
        batch_size: rows per forward pass.

    Raises:
        DataError: rows without labels, or with unknown ones.
    """
    return measure(adapted, dataset, batch_size=batch_size).numbers


def measure(
    adapted: Adapted,
    dataset: Any,
    *,
    batch_size: int = BATCH,
    together: bool = False,
    prefix: Prefix | None = None,
) -> Measured:
    """The same with what was measured of each row, so that more can be said of it without a second pass.

    Args:
        adapted, dataset, batch_size: as `evaluate` takes them.
        together: all processes of the run call this, and each measures its part of the rows; the batches, and so the
            numbers, are those of one process.
        prefix: what is kept of the rows below the model's cut.
    """
    from adapters import readout

    if isinstance(adapted, Mixing):
        raise RequestError(
            message("one adapter is evaluated at a time", where="evaluate", remedy="evaluate(shared.use(name), rows).")
        )
    prepared = prepared_rows(adapted, dataset, labelled=True)
    task = adapted.record.task or adapted.task
    model, processor = adapted.model, adapted.processor
    sums: list[tuple[float, int]] = []  # loss and items of each batch

    output = readout.Readout(model, task, processor, logger.info)
    known = prefix.known(prepared) if prefix is not None else None

    def act(batch: dict[str, Any]) -> tuple[Tensor, ...]:
        labels, numbers = batch["labels"], batch.pop("row", None)
        keys = [known[int(number)] for number in numbers] if known is not None and numbers is not None else None
        kept = prefix.given(batch, keys) if prefix is not None else contextlib.nullcontext()
        with output.passing(batch), kept:
            outputs = output.read(model(**{name: value for name, value in batch.items() if name != "labels"}))
        sums.append((float(task.loss(outputs, labels, 1)), task.items(labels)))
        return task.measured(outputs, batch, model, processor)

    found = over_batches("evaluating", adapted, prepared, act, batch_size, together=together, numbered=True)
    batches = -(-len(prepared) // batch_size)
    if together and parted(model, batches):
        shares = ranks.gathered(sums)
        sums = [shares[batch % len(shares)][batch // len(shares)] for batch in range(batches)]
    total, items = sum(loss for loss, _ in sums), sum(count for _, count in sums)
    with exchange.agreeing() if together and ranks.joined() else contextlib.nullcontext():
        numbers = {"loss": total / max(items, 1), **task.metrics(found, prepared, processor)}
    return Measured(numbers, task, found, prepared)
