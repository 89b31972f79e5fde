"""Rows from files, folders, the hub and plain Python, by split; their columns.

Files are read anew every time, as they are written. What a column means is the task's affair.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapters import conversations, corpora, images, progress, squad, tables
from adapters.errors import DataError, RequestError, message, nearest
from adapters.sources import (
    KINDS,
    SPLIT_NAMES,
    SUFFIXES,
    files_of,
    names_files,
    refuse_columns,
    refuse_untrained,
    split_name,
    suffix,
)

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Source = "str | Path | Dataset | Mapping[str, Any] | Sequence[Mapping[str, Any]]"


def read(source: Any, say: Callable[[str], None] | None = None) -> dict[str, Dataset]:
    """Every split of a source of rows.

    Args:
        source: a `Dataset` or `DatasetDict`, a list of dicts, a mapping of split names to these, a file (csv, tsv,
            json, jsonl, parquet: tables; txt: a row a paragraph; conll, iob, bio: tokens and tags; .gz too), several
            files as a list or a pattern ("shards/*.jsonl"), a folder with train/validation/test files, a folder of
            pictures by class or with a metadata file, or a hub id; id:subset where it has several.
        say: takes one line at a time about what was chosen or left out; None logs it.

    Returns:
        "train", and "validation" and "test" where the source names them.

    Raises:
        DataError: a file that cannot be read, empty data, rows of different kinds; with row and column. Pictures are
            opened by the task.
        RequestError: a source that is not there.
    """
    say = say or logger.info
    if isinstance(source, Mapping):
        splits = {}
        for name, part in source.items():
            if split_name(str(name)) in splits:
                raise RequestError(message(f"the split {split_name(str(name))!r} is given twice", where="data"))
            splits[split_name(str(name))] = one(part, say)
    elif isinstance(source, str | Path):
        with progress.Job(f"reading {Path(source).name}"):
            splits = _read_path(source, say)
    elif names_files(source):
        with progress.Job(f"reading {len(source)} files"):
            splits = {"train": _read_files(files_of(source)["train"], say)}
    elif isinstance(source, Sequence):
        splits = {"train": tables.from_dicts([_plain(row) for row in source], "list of rows")}
    else:
        from datasets import Dataset

        if not isinstance(source, Dataset):
            raise RequestError(
                message(
                    "not a source of rows",
                    where="data",
                    expected="a file, folder, id, Dataset or list of dicts",
                    found=type(source).__name__,
                )
            )
        splits = {"train": source}
    for name, rows in splits.items():
        if len(rows) == 0:
            raise DataError(message("the data is empty", where=f"split {name!r}", found="0 rows"))
    return splits


def _plain(row: Any) -> Any:
    """A row with paths as text and PIL images as datasets stores them: their class depends on their file's format."""
    if not isinstance(row, Mapping):
        return row
    pillow = sys.modules.get("PIL.Image")  # no picture stands in a row before Pillow is imported
    kept = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in row.items()}
    for name, value in kept.items():
        if pillow is not None and isinstance(value, pillow.Image):
            from datasets import Image

            kept[name] = Image().encode_example(value)
    return kept


def one(source: Any, say: Callable[[str], None] | None = None) -> Dataset:
    """The rows of a source that has, or is, one set of rows: its "train" part.

    Args:
        source, say: as `read` takes them.

    Raises:
        DataError: a source with other parts only.
    """
    splits = read(source, say)
    if "train" not in splits:
        raise DataError(
            message(
                "the data has no part 'train'", where="data", found=", ".join(splits), remedy="Give one set of rows."
            )
        )
    return splits["train"]


def at(rows: Any, places: Sequence[int]) -> list[Any]:
    """The rows at some places of a set, in this order; of a `Dataset` in one reading, which takes a quarter of many."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        found: list[Any] = rows.__getitems__(list(places))
        return found
    return [rows[place] for place in places]


def _read_path(source: str | Path, say: Callable[[str], None]) -> dict[str, Dataset]:
    path, files = Path(source).expanduser(), files_of(source)
    if not files:
        return _read_pictures_of(path, say) if path.is_dir() else _read_hub(str(source), say)
    return {part: _read_files(of_part, say) for part, of_part in files.items()}


def _read_pictures_of(path: Path, say: Callable[[str], None]) -> dict[str, Dataset]:
    """The parts of a folder of pictures."""
    pictures = images.layout(path, SPLIT_NAMES)
    if not pictures:
        refuse_untrained(path)
    return {part: _read_pictures(folder, say) for part, folder in pictures.items()}


def _read_files(files: Sequence[Path], say: Callable[[str], None]) -> Dataset:
    """One part that stands in one file, or in several with the same columns.

    Raises:
        DataError: a file of another kind, or with other columns than the first.
    """
    from datasets import concatenate_datasets

    parts = [_table(file, say) for file in files]
    for file, rows in zip(files, parts, strict=True):
        if rows.features != parts[0].features:
            refuse_columns(file, files[0], rows.features, parts[0].features)
    return concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def _read_pictures(folder: Path, say: Callable[[str], None]) -> Dataset:
    metadata = images.metadata_of(folder)
    if metadata is None:
        rows, remarks = images.from_classes(folder)
    else:
        rows, remarks = images.from_metadata(_read_file(metadata, say), metadata)
    for remark in remarks:
        say(remark)
    return rows


def _read_hub(name: str, say: Callable[[str], None]) -> dict[str, Dataset]:
    from datasets import DatasetDict

    loaded = hub(name)
    splits = of_hub(name, loaded if isinstance(loaded, DatasetDict) else {"train": loaded}, say)
    if "train" not in splits:
        refuse_untrainable(name, loaded)
    return splits


def refuse_untrainable(name: str, splits: Iterable[Any]) -> NoReturn:
    """Refuse a data set of the hub whose splits are none to train on.

    Raises:
        DataError: with their names.
    """
    raise DataError(
        message(
            "the data set has no split to train on",
            where=name,
            expected="a split 'train'",
            found=", ".join(map(str, splits)),
            remedy="Load it with datasets.load_dataset and pass a mapping, e.g. {'train': loaded['...']}.",
        )
    )


def hub(name: str, **how: Any) -> Any:
    """A data set of the hub, as `datasets` loads it.

    Args:
        name: the id, and behind a colon the name of a subset.
        how: what `load_dataset` takes.

    Raises:
        RequestError: it cannot be loaded.
    """
    from datasets import load_dataset

    try:
        with progress.tamed():
            return load_dataset(*name.split(":", 1), **how)
    except Exception as fault:  # the loaders raise whatever their parsers and the network raise
        raise RequestError(
            message(
                f"neither a file nor a data set that can be loaded: {name!r}",
                where="data",
                found=" ".join(str(fault).split())[:300],
                remedy="Give a file that is there, or a hub id (id:subset where a data set has several).",
            )
        ) from fault


def of_hub(name: str, loaded: Mapping[Any, Any], say: Callable[[str], None]) -> dict[str, Dataset]:
    """The parts of a data set of the hub; those that are none of ours, or whose labels are hidden, are left out.

    Args:
        name: the id.
        loaded: its splits; what is none of ours is not looked at.
        say: takes a line on each that is left out.
    """
    splits: dict[str, Dataset] = {}
    for part, rows in loaded.items():
        if part not in SPLIT_NAMES:
            say(f"{name}: left out the split {part!r}, which is none of {', '.join(SPLIT_NAMES)}")
            continue
        label = next((column for column in rows.column_names if _is_blank(rows, column)), None)
        # A task that needs the labels refuses rows without them to train on.
        if label is None or SPLIT_NAMES[part] == "train":
            splits[split_name(str(part))] = _paragraphs(rows, f"{name}, {part}", say)
        else:
            say(f"{name}: left out the split {part!r}, whose column {label!r} holds no labels")
    return splits


def _paragraphs(rows: Dataset, where: str, say: Callable[[str], None]) -> Dataset:
    """Plain text line by line, as corpora stand on the hub, without the empty lines: they divide, as in a .txt file."""
    if rows.column_names != ["text"]:
        return rows
    kept = [index for index, text in enumerate(rows["text"]) if text is None or text.strip()]
    if 0 < len(kept) < len(rows):
        say(f"{where}: left out {len(rows) - len(kept)} of {len(rows)} lines, which are empty")
        return rows.select(kept)
    return rows


def _is_blank(rows: Dataset, column: str) -> bool:
    """Whether a column of class numbers names no class in any row: how the hub marks a hidden test's labels."""
    names = getattr(rows.features[column], "names", None)
    return bool(names) and len(rows) > 0 and all(value is None or value < 0 for value in rows[column])


def _table(path: Path, say: Callable[[str], None]) -> Dataset:
    """The rows of one file; a column of pictures' paths is read as pictures."""
    return images.from_paths(_read_file(path, say), path)


def _read_file(path: Path, say: Callable[[str], None]) -> Dataset:
    kind = suffix(path)
    if kind not in SUFFIXES:
        raise RequestError(message("unknown kind of file", where=str(path), expected=KINDS))
    if path.stat().st_size == 0:
        raise DataError(message("the file is empty", where=str(path), found="0 bytes"))
    if kind in ("csv", "tsv"):
        return tables.read_csv(path)
    if kind == "parquet":
        return tables.read_parquet(path)
    if kind in ("json", "jsonl"):
        return tables.from_dicts(_rows_of(tables.read_json(path), str(path)), str(path))
    rows, remark = (corpora.paragraphs if kind == "txt" else corpora.tagged)(tables.text_of(path), str(path))
    say(remark)
    return rows


def _rows_of(records: list[Any], where: str) -> list[Any]:
    """The rows of a JSON file; SQuAD's articles become rows, any other record around the rows is refused."""
    if squad.is_nested(records):
        return list(squad.flattened(records[0], where))
    if len(records) == 1 and isinstance(records[0], Mapping):
        for name, value in records[0].items():
            nested = isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)
            if nested and name not in (*conversations.TURNS, "answers"):
                raise DataError(
                    message(
                        "one record that holds the rows",
                        where=f"{where}, column {name!r}",
                        expected="a list of rows, or one row a line",
                        found=f"1 record with {', '.join(map(repr, records[0]))}",
                        remedy=f"Save the list under {name!r} as the file.",
                    )
                )
    return records


def rename(rows: Dataset, columns: Mapping[str, str] | None, known: Mapping[str, str]) -> Dataset:
    """Give the task's column names to a source's columns; a column of pictures becomes one of references or bytes.

    Args:
        rows: the source.
        columns: task column -> source column; the only renaming there is.
        known: the task's columns and what they hold.

    Raises:
        RequestError: a column that the task does not know, or that the source lacks.
    """
    columns = columns or {}
    for wanted, found in columns.items():
        if wanted not in known:
            raise RequestError(
                message(f"the task has no column {wanted!r}", where="columns", remedy=nearest(wanted, known))
            )
        if found not in rows.column_names:
            raise DataError(
                message(
                    f"there is no column {found!r}",
                    where="columns",
                    remedy=nearest(found, rows.column_names),
                )
            )
    taken = {found: wanted for wanted, found in columns.items()}
    dropped = [name for name in rows.column_names if name in columns and name not in taken]
    if columns:
        rows = rows.remove_columns(dropped).rename_columns({f: w for f, w in taken.items() if f != w})
    return pictures(rows) if "image" in known else rows


def need_column(rows: Dataset, column: str) -> None:
    """Refuse rows without a column that the task needs.

    Raises:
        DataError: with the columns that are there.
    """
    if column not in rows.column_names:
        raise DataError(
            message(
                f"there is no column {column!r}",
                where="data",
                found=", ".join(rows.column_names),
                remedy=f"Name the right one: columns={{{column!r}: ...}}.",
            )
        )


def texts_in(values: Sequence[Any], column: str, start: int = 0) -> list[str]:
    """The texts of a column.

    Args:
        values: the column's values.
        column, start: its name and the number of its first row, for the message.

    Raises:
        DataError: a row that is not text, or an empty one.
    """
    texts = list(values[:])  # a lazy column is read whole: one row after the other takes many times as long
    for index, value in enumerate(texts):
        if not isinstance(value, str) or not value.strip():
            raise DataError(
                message(
                    "an empty text" if isinstance(value, str) else "a row that is not text",
                    where=f"row {start + index}, column {column!r}",
                    expected="text",
                    found=repr(value)[:80],
                    remedy="Fill or remove the row.",
                )
            )
    return texts


def pictures(rows: Dataset, column: str = "image") -> Dataset:
    """The same rows, a column of paths, bytes or pictures kept as datasets keeps pictures, none of them opened.

    Raises:
        DataError: a column that holds something else.
    """
    import pyarrow
    from datasets import Image

    if column not in rows.column_names:
        return rows
    try:
        return rows.cast_column(column, Image(decode=False))
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, pyarrow.ArrowTypeError, TypeError) as fault:
        raise DataError(
            message(
                "a column that holds no pictures",
                where=f"column {column!r}",
                expected="paths, bytes or images",
                found=str(rows.features[column])[:80],
            )
        ) from fault
