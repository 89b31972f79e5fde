"""Answers to rows of which each goes through its own adapter: prepared, put into shared passes, and back in order.

Rows of one model class share their passes; where their heads differ in size, or their tasks in what they ask, all
blocks run once and what is above them once for each kind. What is below the lowest module that any of a pass's adapters
changes is computed once for rows of the same content. Rows of adapters that no pass can mix run apart, by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from torch import Tensor

from adapters.data import one
from adapters.errors import DataError, RequestError, message
from adapters.modes import evaluating
from adapters.predict import array, is_prepared, joined, prepared_by, whole
from adapters.prefix import Cut, Prefix, answering, unpadded
from adapters.progress import Job
from adapters.residents import Resident, Residents
from adapters.states import States

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Adapted, Task
    from adapters.trunks import Trunk

logger = logging.getLogger(__name__)

# Options of a task that decide what an answer is called, not what the model is given or asked.
OF_ANSWERS = ("labels", "class_weights", "label_smoothing", "threshold")


@final
@dataclass(frozen=True)
class Prepared:
    """Rows of adapters whose tasks prepare alike.

    Attributes:
        rows: prepared; whose: the number in the request of each one's raw row.
    """

    rows: Dataset
    whose: tuple[int, ...]


@final
@dataclass(eq=False)
class Item:
    """One prepared row: where it stands, and what was found for it."""

    resident: Resident
    source: Prepared
    index: int
    length: int
    content: Any
    found: tuple[np.ndarray[Any, Any], ...] = field(default=())


def answers(
    residents: Residents,
    use: Callable[[str], Adapted],
    rows: Any,
    adapter: Sequence[str] | str,
    batch_size: int,
) -> list[Any]:
    """One answer a row, in the order of the rows, as each row's own adapter alone would give it.

    Raises:
        RequestError: unknown adapters, or not one a row.
        DataError: a row that is not what its adapter's task takes.
    """
    if not isinstance(batch_size, int) or batch_size < 1:
        raise RequestError(
            message("a wrong value", where="batch_size", expected="a whole number > 0", found=batch_size)
        )
    given = _listed(rows)
    names = [adapter] * len(given) if isinstance(adapter, str) else list(adapter)
    if len(names) != len(given):
        raise RequestError(
            message(
                "not one adapter a row",
                where="adapter",
                expected=f"{len(given)} names",
                found=f"{len(names)}",
                remedy="Give a name for each row, or one name for all.",
            )
        )
    whose = [residents[name] for name in names]
    items: list[Item] = []
    for group in _grouped(range(len(given)), lambda number: _prepares(whose[number])).values():
        items += _prepared(group, given, whose)
    with Job("predicting", len(items), "rows") as job:
        for alike in _grouped(items, _joins).values():
            for portion in residents.portions(item.resident.name for item in alike):
                inside = set(portion)
                _passed(residents, use, [item for item in alike if item.resident.name in inside], batch_size, job)
    return _decoded(items, len(given))


def _listed(rows: Any) -> list[Any]:
    if is_prepared(rows):
        raise RequestError(
            message("prepared rows, which belong to one adapter's task", where="rows", remedy="Give the raw rows.")
        )
    if isinstance(rows, Sequence) and not isinstance(rows, str):
        return list(rows)
    return list(one(rows))


def _grouped(entries: Any, key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return found


# ---------------------------------------------------------------------- preparing


def _asks(task: Task) -> tuple[Any, ...]:
    """What a task makes of rows and asks of the model, whatever its answers are called."""
    options = {entry.name: getattr(task, entry.name) for entry in dataclasses.fields(task)}  # type: ignore[arg-type]
    return type(task), repr(sorted((name, value) for name, value in options.items() if name not in OF_ANSWERS))


def _prepares(resident: Resident) -> tuple[Any, ...]:
    return id(resident.trunk), id(resident.processor), _asks(resident.task)


def _joins(item: Item) -> tuple[Any, ...]:
    """Rows that fit into one batch of the same model."""
    resident = item.resident
    return id(resident.trunk), type(resident.task), tuple(sorted(item.source.rows.column_names))


def _answers(item: Item) -> tuple[Any, ...]:
    """Rows whose answers are read off one pass: of heads of one size, asked the same."""
    return item.resident.shape, _asks(item.resident.task)


def _prepared(numbers: Sequence[int], given: Sequence[Any], whose: Sequence[Resident]) -> list[Item]:
    """Rows of adapters that prepare alike, prepared at once; adapter by adapter where rows do not stay apart."""
    first = whose[numbers[0]]
    try:
        raw = whole(first.task, [given[number] for number in numbers])
        rows = prepared_by(first.task, first.processor, first.trunk.net, raw, labelled=False)
    except DataError as fault:
        if len(numbers) == len(given):
            raise
        names = sorted({whose[number].name for number in numbers})
        told = f"{', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        raise DataError(f"{fault} Counted are the {len(numbers)} rows of {told}.") from fault
    if "example" in rows.column_names:
        places = [numbers[place] for place in rows["example"]]
    elif len(rows) == len(numbers):
        places = list(numbers)
    elif len({whose[number].name for number in numbers}) > 1:
        parts = _grouped(numbers, lambda number: whose[number].name).values()
        return [item for part in parts for item in _prepared(part, given, whose)]
    else:
        places = [numbers[0]] * len(rows)
    source = Prepared(rows, tuple(places))
    texts = rows["input_ids"] if "input_ids" in rows.column_names else None
    lengths = rows["length"]
    return [
        Item(whose[place], source, index, lengths[index], _content(texts[index] if texts else given[place]))
        for index, place in enumerate(places)
    ]


def _content(value: Any) -> int:
    """A number that equal rows have in common; only the order of rows hangs on it."""
    if isinstance(value, list):
        return hash(tuple(value))
    if isinstance(value, Mapping) and value:
        return _content(next(iter(value.values())))
    return hash(value) if isinstance(value, str) else id(value)


# ---------------------------------------------------------------------- passes


def _passed(
    residents: Residents, use: Callable[[str], Adapted], items: Sequence[Item], batch_size: int, job: Job
) -> None:
    """What the model finds for rows that fit into one batch."""
    trunk = items[0].resident.trunk
    names = list(dict.fromkeys(item.resident.name for item in items))
    ordered = sorted(items, key=lambda item: (-item.length, item.content))
    with residents.needed(names):
        _divide(trunk, ordered)
        below = Below(trunk)
        sharing = [item for item in ordered if not item.resident.apart]
        kinds = list(_grouped(sharing, _answers).values())
        if len(kinds) > 1 and below.whole(_inputs(trunk, sharing[:2])):
            kinds = [sharing]
        groups: list[tuple[Any, Sequence[Item]]] = [(below, kind) for kind in kinds]
        apart = _grouped([item for item in ordered if item.resident.apart], lambda item: item.resident.name)
        groups += [(use(name).model, group) for name, group in apart.items()]
        for how, group in groups:
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                _pass(trunk, how, batch)
                job.advance(len(batch))


def _divide(trunk: Trunk, items: Sequence[Item]) -> None:
    """Find out which adapters can share a pass; said once of each that cannot."""
    unknown = {item.resident.name: item.resident for item in items if item.resident.apart is None}
    if not unknown:
        return
    inputs = _inputs(trunk, items[:1])
    odd = [name for name, resident in unknown.items() if resident.stands_apart(inputs)]
    if odd:
        logger.warning(
            "rows of %s run apart from those of other adapters: a pass of %s uses a tensor that they change for all "
            "rows at once",
            ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else ""),
            type(trunk.net).__name__,
        )


def _inputs(trunk: Trunk, items: Sequence[Item]) -> dict[str, Any]:
    resident = items[0].resident
    features = [item.source.rows[item.index] for item in items]
    batch = resident.task.collate(features, trunk.net, resident.processor)
    device = trunk.net.device
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
        if name not in ("row", "labels")
    }


def _pass(trunk: Trunk, how: Any, items: Sequence[Item]) -> None:
    """One batch; `how` is what is below the adapters, or the one adapter's own model."""
    inputs = _inputs(trunk, items)
    if not isinstance(how, Below):
        with evaluating(how), torch.inference_mode():
            _find(how, inputs, items)
        return
    names = [item.resident.name for item in items]
    with evaluating(trunk.mixed), torch.inference_mode(), trunk.choice.made(names):
        kinds = list(_grouped(range(len(items)), lambda row: _answers(items[row])).values())
        with how.given(inputs, [item.resident for item in items]):
            if len(kinds) == 1:
                _find(trunk.mixed, inputs, items)
                return
            states = how.whole_states(inputs)
        for rows in kinds:
            own = some(inputs, rows)
            with trunk.choice.made([names[row] for row in rows]), how.above(states[rows]):
                _find(trunk.mixed, own, [items[row] for row in rows])


def _find(model: Any, inputs: dict[str, Any], items: Sequence[Item]) -> None:
    resident = items[0].resident
    found = [array(part) for part in resident.task.answered(model, inputs, resident.processor)]
    for row, item in enumerate(items):
        item.found = tuple(part[row : row + 1] for part in found)


@final
class Below:
    """Hidden states below the adapters of a pass, computed once for rows of the same content.

    Rows of the same content follow each other, so what the last batch had is all that is kept.
    """

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self._prefix: Prefix | None = None
        self._top: Prefix | None = None
        self._tried: dict[str, bool] = {}

    # ------------------------------------------------------------------ all blocks at once, heads apart

    def whole(self, inputs: Mapping[str, Any]) -> bool:
        """Whether all blocks can run for rows of several heads at once, tried on some rows."""
        cut = None if self.trunk.generates or not unpadded(inputs) else self.trunk.cut([frozenset()])
        self._top = Prefix(self.trunk.mixed, cut) if cut is not None and self._fits(cut, inputs) else None
        return self._top is not None

    def whole_states(self, inputs: Mapping[str, Any]) -> Tensor:
        """What the last block gives, (rows, places, width)."""
        assert self._top is not None
        return self._top.run(inputs)

    def above(self, states: Tensor) -> contextlib.AbstractContextManager[None]:
        """Within it a pass over these rows takes the states, and computes what is above."""
        assert self._top is not None
        assert self._top.form is not None
        return answering(self._top.cut, self._top.form, states)

    # ------------------------------------------------------------------ rows of the same content

    @contextlib.contextmanager
    def given(self, inputs: Mapping[str, Any], residents: Sequence[Resident]) -> Iterator[None]:
        """Within it a pass over these rows starts above what its adapters have in common, where that pays."""
        prefix = self._fitting(inputs, residents)
        if prefix is None:
            yield
            return
        keys = prefix.keys(inputs)
        known = {key: state for key in set(keys) if (state := prefix.states.get(key)) is not None}
        if not known and len(set(keys)) == len(keys):  # no two rows are the same
            yield
            return
        prefix.states = States(None, 0)
        for key, state in known.items():
            prefix.states.add(key, state)
        fresh = [row for row, key in enumerate(keys) if key not in known and key not in keys[:row]]
        if fresh:
            with self.trunk.choice.made(()):
                prefix.add(some(inputs, fresh))
        with prefix.given(inputs, keys):
            yield

    def _fitting(self, inputs: Mapping[str, Any], residents: Sequence[Resident]) -> Prefix | None:
        trunk = self.trunk
        if trunk.generates or len({resident.name for resident in residents}) < 2 or not unpadded(inputs):
            return None
        cut = trunk.cut([resident.changed for resident in residents])
        if cut is None:
            return None
        if self._prefix is None or self._prefix.cut != cut:
            self._prefix = Prefix(trunk.mixed, cut)
        return self._prefix if self._fits(cut, some(inputs, range(min(2, len(residents))))) else None

    def _fits(self, cut: Cut, inputs: Mapping[str, Any]) -> bool:
        """Whether the model can be cut there: some rows give the same with and without."""
        if cut.path not in self._tried:
            with self.trunk.choice.made(()):
                fault = Prefix(self.trunk.mixed, cut).fault(inputs)
            self._tried[cut.path] = not fault
            if fault:
                logger.info("nothing is shared below %s: %s", cut.path, fault)
        return self._tried[cut.path]


def some(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of a batch, as wide as the batch."""
    count = next(len(value) for value in inputs.values() if isinstance(value, Tensor))
    return {
        name: value[list(rows)] if isinstance(value, Tensor) and value.ndim and len(value) == count else value
        for name, value in inputs.items()
    }


# ---------------------------------------------------------------------- answers


def _decoded(items: Sequence[Item], count: int) -> list[Any]:
    """The answers, each in the place of its raw row."""
    said: list[Any] = [None] * count
    for group in _grouped(items, lambda item: (item.resident.name, id(item.source))).values():
        resident, source = group[0].resident, group[0].source
        found = tuple(joined([item.found[part] for item in group]) for part in range(len(group[0].found)))
        rows = source.rows.select([item.index for item in group])
        told = resident.task.decode(found, rows, resident.processor)
        places = list(dict.fromkeys(source.whose[item.index] for item in group))
        for place, answer in zip(places, told, strict=True):
            said[place] = answer
    return said
