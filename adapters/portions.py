"""The rows of a run: read, looked at, and divided into its parts, before anything is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from adapters import data, division, formats, streaming
from adapters.adapt import task_class
from adapters.errors import DataError, RequestError, message
from adapters.options import field_names, make
from adapters.tasks import TASKS

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Task


LEFT = ("validation", "test")  # the parts beside the training rows


class Asked(Protocol):
    """What a recipe says of its rows; see there."""

    data: Any
    streaming: bool
    train: dict[str, Any]
    columns: dict[str, str]
    task: str
    options: dict[str, Any]
    labels: list[str] | None
    validation: float
    test: float
    limit: int | None
    seed: int
    split_seed: int | None

    @property
    def model_fields_set(self) -> set[str]:
        """The keys that somebody wrote."""
        ...


Parts = dict[str, Any]  # part -> its rows: a Dataset each; of streamed rows "train" is an `Inflow`


def drawn(recipe: Asked, say: Callable[[str], None]) -> tuple[Parts, Task, dict[str, Any], list[str]]:
    """The rows of a recipe, looked at and divided, before anything is loaded.

    Of rows that are streamed the first ones are looked at, and nothing is divided.

    Returns:
        The parts, the task with what it read off the rows, the strategy's options, and remarks to be said.

    Raises:
        RequestError: what the recipe asks for cannot be.
        DataError: naming the part, the row and the column.
    """
    if recipe.streaming:
        return _streamed(recipe, say)
    splits = data.read(recipe.data, say)
    if "train" not in splits:
        raise RequestError(message("the data has no part 'train'", where=str(recipe.data), found=", ".join(splits)))
    with _task_named(recipe, splits["train"]):
        for name, rows in splits.items():
            splits[name], remark = formats.arrange(rows, recipe.columns, task_class(recipe.task).columns)
            if remark:
                say(f"{name}: {remark}")
        task, options = checked(recipe, splits)
    splits, remarks = divided(recipe, splits, task)
    if recipe.limit is not None:
        splits["train"] = division.sample(
            splits["train"], recipe.limit, seed=_split_seed(recipe), by=_stratum(task, splits["train"])
        )
    return splits, task, options, remarks


def _streamed(recipe: Asked, say: Callable[[str], None]) -> tuple[Parts, Task, dict[str, Any], list[str]]:
    """The same where the training rows are a stream: the other parts are those that the data has."""
    faults = [fault for _, fault in streaming.faults(vars(recipe))]
    if faults:
        raise RequestError(*faults)
    stream, given = streaming.opened(recipe.data, say)
    asked = {name: getattr(recipe, name) for name in LEFT if name in recipe.model_fields_set}
    faults = streaming.lacking(given, asked)
    if faults:
        raise RequestError(*faults)
    sample = streaming.sampled(stream)
    kind = task_class(recipe.task)
    with _task_named(recipe, sample.rows):
        sample, remark = arranged(recipe, sample)
        if remark:
            say(f"train: in the first rows of the stream, {remark}")
        for name, rows in given.items():
            given[name], remark = formats.arrange(rows, recipe.columns, kind.columns)
            if remark:
                say(f"{name}: {remark}")
        own, options = _divided_options(recipe)
        task: Task = streaming.named(make(kind, own, f"task {recipe.task!r}"), sample)
        streaming.checked(task, sample)
        _check(task, given)
    remarks = division.shared(given, _inputs(task, list(given.values()))) if len(given) > 1 else []
    none = [name for name in LEFT if name not in given]
    if none:
        without = "no early stopping, the last weights are kept" if "validation" in none else "nothing is measured"
        remarks.append(f"a stream is not divided, and the data has no {' and no '.join(none)} rows: {without}")
    ordered: Parts = {"train": dataclasses.replace(stream, columns=recipe.columns or None)}
    return ordered | {name: given[name] for name in LEFT if name in given}, task, options, remarks


def looked_at(recipe: Asked, train: Any) -> Dataset:
    """The training rows that `drawn` gave; of a stream the first ones, arranged."""
    if not recipe.streaming:
        return train
    return arranged(recipe, streaming.sampled(train))[0].rows


def counts(parts: Parts) -> dict[str, int | None]:
    """How many rows each part has; None of a stream."""
    return {name: len(rows) if hasattr(rows, "__len__") else None for name, rows in parts.items()}


def told(parts: Parts) -> str:
    """The same in words."""
    found = counts(parts).items()
    return ", ".join(f"{streaming.described(parts[n]) if count is None else count} {n}" for n, count in found)


def arranged(recipe: Asked, sample: streaming.Sample) -> tuple[streaming.Sample, str]:
    """The first rows of a stream as its task takes them, and the remark of `formats.arrange`.

    Raises:
        RequestError, DataError: as `formats.arrange`, with the places of the rows.
    """
    try:
        rows, remark = formats.arrange(sample.rows, recipe.columns, task_class(recipe.task).columns)
    except DataError as fault:
        raise DataError(sample.told(str(fault))) from fault
    return dataclasses.replace(sample, rows=rows), remark


def labelled(source: str, columns: Mapping[str, str], task: Task, say: Callable[[str], None]) -> tuple[str, Dataset]:
    """Rows to measure an adapter on: the test part, where the data has parts; which part it was, and its rows.

    Args:
        source: file, folder or hub id.
        columns: task column -> column of the data.
        task: of the adapter.
        say: takes what is to be said.

    Raises:
        RequestError, DataError: what cannot be read or arranged.
    """
    splits = data.read(source, say)
    part = "test" if "test" in splits else "train"
    rows, remark = formats.arrange(splits[part], columns, task.columns)
    if remark:
        say(f"{part}: {remark}")
    return part, rows


def held_out(source: str, columns: Mapping[str, str], task: Task, say: Callable[[str], None]) -> tuple[str, Dataset]:
    """Rows to choose by: the validation part, or all rows of data without parts; never the test part.

    Args, returns and errors are those of `labelled`.
    """
    splits = data.read(source, say)
    if "validation" not in splits and len(splits) > 1:
        raise RequestError(
            message(
                "the data has no part 'validation', by which something could be chosen",
                where=source,
                found=", ".join(splits),
                remedy="Give a file of validation rows.",
            )
        )
    part = "validation" if "validation" in splits else next(iter(splits))
    rows, remark = formats.arrange(splits[part], columns, task.columns)
    if remark:
        say(f"{part}: {remark}")
    return part, rows


@contextlib.contextmanager
def _task_named(recipe: Asked, rows: Dataset) -> Iterator[None]:
    """Rows that the default task cannot take may be right for another, which has to be named."""

    columns = {*rows.column_names, *recipe.columns}
    try:
        yield
    except DataError as fault:
        if "task" in recipe.model_fields_set or {"text", "label"} <= columns:
            raise
        others = ", ".join(name for name in TASKS if name != recipe.task)
        raise DataError(f"{fault} No task was named, so it is {recipe.task}; the others are {others}.") from fault


def checked(recipe: Asked, splits: Mapping[str, Dataset]) -> tuple[Task, dict[str, Any]]:
    """The task with what it reads off the rows (labels), and the strategy's options, after every row was looked at.

    Raises:
        DataError: naming the part, the row and the column.
    """
    own, options = _divided_options(recipe)
    task: Task = make(task_class(recipe.task), own, f"task {recipe.task!r}").with_rows(splits["train"])
    _check(task, splits)
    task.with_data(splits["train"])  # one label alone is said before anything is loaded
    return task, options


def _divided_options(recipe: Asked) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a recipe says of its task, and the options of its strategy."""
    known = field_names(task_class(recipe.task))
    own = {name: value for name, value in recipe.options.items() if name in known}
    if recipe.labels is not None:
        own["labels"] = recipe.labels
    return own, {name: value for name, value in recipe.options.items() if name not in known}


def _check(task: Task, parts: Mapping[str, Dataset]) -> None:
    """Look at every row of every part."""
    for name, rows in parts.items():
        try:
            task.check(rows, labelled=True)
        except DataError as fault:
            raise DataError(f"{name} part: {fault}") from fault


def divided(recipe: Asked, splits: dict[str, Dataset], task: Task) -> tuple[dict[str, Dataset], list[str]]:
    """The splits that the data has, and those that are missing drawn from the training rows."""

    parts = {}
    if "validation" not in splits:
        parts["validation"] = recipe.validation
    if "test" not in splits and recipe.test:
        parts["test"] = recipe.test
    order = ("train", "validation", "test")
    given = {name: splits[name] for name in order if name in splits}
    train = splits["train"]
    apart = next((column for column in task.apart if column in train.column_names), None)
    remarks = division.shared(given, _inputs(task, list(given.values())))
    if parts:
        drawn, lacking = division.split(train, parts, seed=_split_seed(recipe), by=_stratum(task, train), text=apart)
        splits, remarks = {**splits, **drawn}, remarks + lacking
    return {name: splits[name] for name in order if name in splits}, remarks


def _inputs(task: Task, parts: list[Dataset]) -> list[str]:
    """The columns that make an input, as far as all parts have them."""
    apart = next((column for column in task.apart if column in parts[0].column_names), None)
    return [c for c in (apart, "text_pair") if c and all(c in rows.column_names for rows in parts)]


def _split_seed(recipe: Asked) -> int:
    return recipe.seed if recipe.split_seed is None else recipe.split_seed


def _stratum(task: Task, rows: Dataset) -> str | None:
    """The column whose classes are kept in proportion."""
    return task.stratum if task.stratum in rows.column_names else None
