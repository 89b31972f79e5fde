"""The data of a recipe where its training rows are streamed: these as shards, the other parts read as ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, final

from adapters import data, images, inflow, rowfiles, survey
from adapters.errors import DataError, RequestError, message
from adapters.inflow import Inflow
from adapters.labels import class_names
from adapters.options import field_names
from adapters.sources import SPLIT_NAMES, files_of, split_name, suffix

if TYPE_CHECKING:
    from datasets import Dataset

LOOKED_AT: Final = 2000  # rows of a stream that are looked at before it is trained on, as many of each shard
ANSWERS: Final = ("label", "tags")  # columns whose names a task has to know
SHOWN: Final = 20  # names of labels that a message lists


@final
@dataclass(frozen=True)
class Sample:
    """The first rows of each shard of a stream.

    Attributes:
        rows: as they were read, or arranged.
        places: of each its file and its number there.
    """

    rows: Dataset
    places: tuple[str, ...]

    def told(self, what: str) -> str:
        """A fault or a remark on these rows, with the places of those that it names."""
        return inflow.placed(what, self.places)


def faults(said: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """What a recipe asks for that cannot be where its rows are streamed: path of the key, and the fault.

    Args:
        said: the recipe's keys as plain data.
    """
    train, options = (_section(said, name) for name in ("train", "options"))
    unheard = inflow.unheard(train.get("max_steps"), options.get("class_weights"), train.get("warm_head"))
    for name, fault in unheard.items():
        yield ("options" if name == "class_weights" else "train", name), fault
    if said.get("limit") is not None:
        what = "rows drawn at random are drawn from all of them, which nobody knows of a stream"
        yield ("limit",), message(what, where="limit", remedy="Leave it out: train.max_steps says how many are read.")


def _section(said: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = said.get(name)
    return value if isinstance(value, Mapping) else {}


def opened(source: Any, say: Callable[[str], None]) -> tuple[Inflow, dict[str, Dataset]]:
    """The training rows as a stream, and the other parts of the data as sets.

    Args:
        source: what a recipe's `data` takes: a file, a list or a pattern of files, a folder with the files of its
            parts, a hub id; or a mapping of parts to these.
        say: takes one line at a time about what was chosen or left out.

    Raises:
        RequestError: a source that is not there, or is not read row by row.
        DataError: no rows, files with different columns, a broken row among the first of a file.
    """
    if isinstance(source, Mapping):
        parts = {split_name(str(name)): part for name, part in source.items()}
        if len(parts) < len(source):
            raise RequestError(message("a split is given twice", where="data", found=", ".join(map(str, source))))
        if "train" not in parts:
            raise RequestError(message("the data has no part 'train'", where="data", found=", ".join(map(str, source))))
        return _one(parts.pop("train"), say, alone=True)[0], data.read(parts, say) if parts else {}
    return _one(source, say)


def _one(source: Any, say: Callable[[str], None], *, alone: bool = False) -> tuple[Inflow, dict[str, Dataset]]:
    """The stream of a source, and its other parts unless the training rows alone are wanted."""
    files = files_of(source)
    if files:
        train, others = files.pop("train"), {part: list(map(str, own)) for part, own in files.items()}
        return _of_files(tuple(train), say), data.read(others, say) if others and not alone else {}
    if Path(source).expanduser().is_dir():
        remedy = "Leave streaming out: of a folder of pictures only their names are held, whatever its size."
        raise RequestError(message("a folder that is not read row by row", where=str(source), remedy=remedy))
    name = str(source)
    loaded = data.hub(name, streaming=True)
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}
    if "train" not in splits:
        data.refuse_untrainable(name, splits)
    rows = inflow.opened(splits.pop("train"))
    if alone:
        return rows, {}
    # The parts that are measured are read whole, from the same stream.
    whole = {n: block(list(part), part.features) if n in SPLIT_NAMES else part for n, part in splits.items()}
    return rows, data.of_hub(name, whole, say)


def _of_files(files: tuple[Path, ...], say: Callable[[str], None]) -> Inflow:
    """Files as shards, the beginning of each looked at."""
    kinds = {suffix(file).replace("jsonl", "json"): file for file in files}
    if len(kinds) > 1:  # a number of one kind is a text of another
        found = " and ".join(file.name for file in kinds.values())
        raise RequestError(message("files of several kinds for one part", where="data", found=found))
    features = rowfiles.features_of(files)
    columns: frozenset[str] | None = frozenset(features) if features is not None else None
    empty = []
    for file in files:
        row = next(iter(rowfiles.RowFiles((file,), columns)), None)
        if row is None:
            empty.append(file)
        elif columns is None:
            columns = frozenset(row)
    if len(empty) == len(files):
        raise DataError(message("the data is empty", where=", ".join(map(str, files[:3])), found="0 rows"))
    if empty:
        say(f"{len(empty)} of {len(files)} files hold no rows: {', '.join(file.name for file in empty[:3])}")
    return Inflow(rowfiles.RowFiles(files, columns), len(files), tuple(map(str, files)), features)


def block(rows: Sequence[Mapping[str, Any]], features: Any) -> Dataset:
    """Some rows of a stream as a set, with the features of the stream where they are known (the names of classes)."""
    from datasets import Dataset

    plain = [dict(row) for row in rows]
    return data.one(plain) if features is None else Dataset.from_list(plain, features=features)


def sampled(train: Inflow) -> Sample:
    """The first rows of each shard, as many of each.

    Raises:
        DataError: rows that are broken, or of different kinds.
        RequestError: rows that name pictures, which are not opened on the way.
    """
    found = train.first(LOOKED_AT, max(1, LOOKED_AT // train.shards))
    if not found:
        raise DataError(message("the data is empty", where=train.name(0), found="0 rows"))
    places = tuple(place for place, _ in found)
    try:
        rows = block([row for _, row in found], train.features)
    except DataError as fault:
        raise DataError(inflow.placed(str(fault), places)) from fault
    column = images.column_of_paths(rows)
    if column is not None:
        remedy = "Leave streaming out: a table of names is small. Or keep the pictures themselves, in parquet files."
        raise RequestError(
            message("a stream of pictures' names", where=f"{train.name(0)}, column {column!r}", remedy=remedy)
        )
    return Sample(rows, places)


def named(task: Any, sample: Sample) -> Any:
    """The task with its labels, which a stream cannot be searched for: the recipe names them, or the files do.

    Args:
        task: as the recipe has it.
        sample: arranged rows.

    Raises:
        RequestError: nobody names them.
    """
    known = field_names(type(task))
    problem = task.problem if "problem" in known else ""
    if "labels" not in known or task.labels or problem == "regression":
        return task.with_rows(sample.rows)
    column = next((name for name in ANSWERS if name in sample.rows.column_names), None)
    if column is None or class_names(sample.rows, column):
        return task.with_rows(sample.rows)
    counts = survey.counted(survey.label_names(sample.rows, column, many=problem == "multi-label"))
    there = sorted(counts, key=lambda name: (name != "O", name))
    shown = ", ".join(there[:SHOWN]) + (" ..." if len(there) > SHOWN else "")
    raise RequestError(
        message(
            "the labels of a stream have to be named: nobody knows all of its rows",
            where="labels",
            expected="all of them, in their order",
            found=f"in the first {len(sample.rows)} rows {shown}",
            remedy=f"Say labels: [{shown}], with those that stand further on.",
        )
    )


def checked(task: Any, sample: Sample) -> None:
    """Look at the first rows of each shard as the task would at all of them.

    Raises:
        DataError: naming the file, the row and the column.
    """
    try:
        task.check(sample.rows, labelled=True)
    except DataError as fault:
        raise DataError(f"train part: {sample.told(str(fault))}") from fault


def described(train: Inflow) -> str:
    """The stream in words."""
    return f"a stream of {train.shards} {'files' if train.files else 'shards'}" if train.shards > 1 else "a stream"


def lacking(parts: Mapping[str, Any], shares: Mapping[str, float]) -> list[str]:
    """What a recipe asks for in vain: shares of a stream for parts that the data has not; a fault each.

    Args:
        parts: of the data.
        shares: that somebody wrote, by part.
    """
    faults = []
    for name, share in shares.items():
        if share and name not in parts:
            what = "a share of a stream cannot be drawn: nobody knows how many rows it has"
            remedy = f"Name a file of them: data: {{train: ..., {name}: ...}}."
            faults.append(message(what, where=name, found=share, remedy=remedy))
    return faults
