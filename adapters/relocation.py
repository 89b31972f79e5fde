"""A head moved to another place of the backbone after its model was adapted, as a solved probe chooses it."""

from __future__ import annotations

import dataclasses
from typing import Any

from adapters import pooling, reading
from adapters.adapt import set_gradients
from adapters.anatomy import own_name
from adapters.contracts import Adapted
from adapters.errors import RequestError, message
from adapters.options import field_names


def move(adapted: Adapted, pooled: str | None, layer: int | None) -> None:
    """Let the head of a live adaptation read elsewhere from now on; the backbone and its names stay.

    The task in the record gets these options, and is what is saved. Parameters that the computation loses (BERT's
    pooler, a dense layer of the head, blocks above) no longer train and are in no file; those that it regains do.

    Args:
        adapted: its model, record, `trained` and `head` change.
        pooled: "first", "mean" or "last" hidden state; "own" or None for the model class's own reading.
        layer: how many blocks run below the head; None for all.

    Raises:
        RequestError: a task or a model that cannot be read so, or blocks above that train; nothing has changed then.
    """
    task: Any = adapted.record.task or adapted.task
    asked = {"pooling": pooled, "layer": layer}
    known = field_names(type(task))
    odd = [name for name, value in asked.items() if value is not None and name not in known]
    if odd:
        raise RequestError(message(f"task {task.name!r} has no option {odd[0]!r}", where=odd[0]))
    task = dataclasses.replace(task, **{name: value for name, value in asked.items() if name in known})
    read = reading.of(task)
    found = pooling.planned(adapted.model, read)
    blocks = tuple(f"{path}." for path in found.forms)
    above = {name for name in found.unread if name.startswith(blocks)} if blocks else set()
    body = {own_name(name) for name in adapted.chosen}
    pooling.refuse_unread(body, found.unread, above, read)
    pooling.strip(adapted.model)
    pooling.put(adapted.model, found)
    adapted.record.task, adapted.record.unread = task, found.unread
    set_gradients(adapted)
