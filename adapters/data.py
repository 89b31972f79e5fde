"""Rows from files, folders, the hub and plain Python; splits of them; their fingerprint.

Files are read as they are written: no value is guessed to be missing, no column to be a number. What a column
means is the task's affair.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters.errors import DataError, RequestError, message, nearest

if TYPE_CHECKING:
    from datasets import Dataset

csv.field_size_limit(1 << 30)  # characters; a long text is one field
Source = "str | Path | Dataset | Mapping[str, Any] | Sequence[Mapping[str, Any]]"
SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}


def read(source: Any) -> dict[str, Dataset]:
    """Every split of a source of rows.

    Args:
        source: a `Dataset` or `DatasetDict`, a list of dicts, a mapping of split names to these, a file (csv, tsv,
            json, jsonl, parquet; .gz too), a folder with train/validation/test files, or a hub id.

    Returns:
        "train", and "validation" and "test" where the source names them.

    Raises:
        DataError: a file that cannot be read, empty data, rows of different kinds; with row and column.
        RequestError: a source that is not there.
    """
    from datasets import Dataset

    if isinstance(source, Dataset):
        splits = {"train": source}
    elif isinstance(source, Mapping):
        splits = {}
        for name, part in source.items():
            if _split_name(str(name)) in splits:
                raise RequestError(message(f"the split {_split_name(str(name))!r} is given twice", where="data"))
            splits[_split_name(str(name))] = one(part)
    elif isinstance(source, str | Path):
        splits = _read_path(source)
    elif isinstance(source, Sequence):
        splits = {"train": _from_dicts(list(source), "list of rows")}
    else:
        raise RequestError(
            message(
                "not a source of rows",
                where="data",
                expected="a file, folder, id, Dataset or list of dicts",
                found=type(source).__name__,
            )
        )
    for name, rows in splits.items():
        if len(rows) == 0:
            raise DataError(message("the data is empty", where=f"split {name!r}", found="0 rows"))
    return splits


def one(source: Any) -> Dataset:
    """The rows of a source that has, or is, one set of rows: its "train" part.

    Raises:
        DataError: a source with other parts only.
    """
    splits = read(source)
    if "train" not in splits:
        raise DataError(
            message(
                "the data has no part 'train'", where="data", found=", ".join(splits), remedy="Give one set of rows."
            )
        )
    return splits["train"]


def _split_name(name: str) -> str:
    if name not in SPLIT_NAMES:
        raise RequestError(message(f"unknown split {name!r}", where="data", remedy=nearest(name, SPLIT_NAMES)))
    return SPLIT_NAMES[name]


def _read_path(source: str | Path) -> dict[str, Dataset]:
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": _read_file(path)}
    if path.is_dir():
        found: dict[str, Path] = {}
        for file in sorted(path.iterdir()):
            stem = file.name.split(".")[0]
            part = next((SPLIT_NAMES[word] for word in reversed(stem.split("_")) if word in SPLIT_NAMES), None)
            if part is not None and _reader(file) is not None:
                if part in found:
                    raise RequestError(
                        message(
                            f"two files for the split {part!r}",
                            where=str(path),
                            found=f"{found[part].name} and {file.name}",
                            remedy="Give one file, or a mapping of splits to files.",
                        )
                    )
                found[part] = file
        if "train" not in found:
            raise RequestError(
                message(
                    "no training file in the folder",
                    where=str(path),
                    expected="train.csv, train.jsonl, train.parquet ...",
                    found=", ".join(sorted(f.name for f in path.iterdir())[:8]) or "an empty folder",
                )
            )
        return {part: _read_file(file) for part, file in found.items()}
    if isinstance(source, Path) or not _looks_like_id(str(source)):
        raise RequestError(
            message(
                "there is no such file or folder",
                where=str(source),
                remedy="Give a csv, json, jsonl or parquet file, a folder of them, or a hub id.",
            )
        )
    return _read_hub(str(source))


def _looks_like_id(text: str) -> bool:
    """A hub id, not a path that is missing: a local path never becomes a look-up."""
    return (
        text.count("/") <= 1
        and not text.startswith((".", "/", "~"))
        and not text.endswith("/")
        and ("." not in text.rpartition("/")[2] or Path(text).suffix.lower().strip(".") not in _SUFFIXES)
    )


_SUFFIXES = {"csv", "tsv", "json", "jsonl", "parquet", "gz", "txt"}


def _read_hub(name: str) -> dict[str, Dataset]:
    from datasets import DatasetDict, load_dataset

    try:
        loaded = load_dataset(name)
    except Exception as fault:  # the loaders raise whatever their parsers and the network raise
        raise RequestError(
            message(
                f"neither a file nor a data set that can be loaded: {name!r}",
                where="data",
                found=" ".join(str(fault).split())[:300],
                remedy="Give a file that is there, or the id of a data set on the hub.",
            )
        ) from fault
    if not isinstance(loaded, DatasetDict):
        return {"train": cast("Dataset", loaded)}
    return {SPLIT_NAMES[part]: rows for part, rows in loaded.items() if part in SPLIT_NAMES}


def _reader(path: Path) -> Callable[[Path], Dataset] | None:
    suffix = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    return {"csv": _read_csv, "tsv": _read_csv, "json": _read_json, "jsonl": _read_json, "parquet": _read_parquet}.get(
        suffix
    )


def _read_file(path: Path) -> Dataset:
    reader = _reader(path)
    if reader is None:
        raise RequestError(
            message("unknown kind of file", where=str(path), expected="csv, tsv, json, jsonl or parquet (.gz too)")
        )
    if path.stat().st_size == 0:
        raise DataError(message("the file is empty", where=str(path), found="0 bytes"))
    return reader(path)


def _read_csv(path: Path) -> Dataset:
    """A table as it is written: all is text, "NA" and "null" too, and each row has as many fields as the header."""
    from datasets import Dataset

    name = path.name.lower()
    separator, other = ("\t", ",") if name.removesuffix(".gz").endswith(".tsv") else (",", "\t")
    opener = gzip.open if name.endswith(".gz") else open
    rows: list[list[str]] = []
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(cast("Iterable[str]", stream), delimiter=separator, strict=True)
            for row in reader:
                if row and rows and len(row) != len(rows[0]):
                    raise DataError(
                        message(
                            "a row with another number of fields than the header",
                            where=f"{path}, line {reader.line_num}",
                            expected=f"{len(rows[0])} fields",
                            found=f"saw {len(row)}",
                            remedy="Put texts that hold the separator into double quotes.",
                        )
                    )
                if row:
                    rows.append(row)
                if len(rows) == 1:
                    _check_header(rows[0], path, separator, other)
    except (csv.Error, UnicodeDecodeError, OSError, EOFError, zlib.error) as fault:
        raise DataError(
            message(
                "cannot read the table",
                where=f"{path}, row {len(rows)}",
                expected="utf-8 text, fields in double quotes where they hold the separator",
                found=" ".join(str(fault).split()),
            )
        ) from fault
    if len(rows) < 2:
        raise DataError(message("the data is empty", where=str(path), found="a header and 0 rows"))
    return Dataset.from_dict({column: [row[index] for row in rows[1:]] for index, column in enumerate(rows[0])})


def _check_header(header: list[str], path: Path, separator: str, other: str) -> None:
    if len(header) == 1 and any(mark in header[0] for mark in (";", other, "|")):
        raise DataError(
            message(
                "one column whose name holds a separator",
                where=str(path),
                expected=f"fields divided by {separator!r}",
                found=repr(header[0]),
                remedy="Save the file with commas as .csv, or with tabs as .tsv.",
            )
        )
    twice = [name for name, times in Counter(header).items() if times > 1]
    if twice:
        raise DataError(message(f"the column {twice[0]!r} stands twice", where=str(path)))


def _read_json(path: Path) -> Dataset:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    rows: list[Any] = []
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as stream:
            text = stream.read()
    except (UnicodeDecodeError, OSError, EOFError, zlib.error) as fault:
        raise DataError(message("cannot read the file", where=str(path), found=fault)) from fault
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as fault:
            raise DataError(message("broken JSON", where=str(path), found=fault)) from fault
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as fault:
                    raise DataError(message("broken JSON", where=f"{path}, line {number}", found=fault)) from fault
    return _from_dicts(rows, str(path))


def _read_parquet(path: Path) -> Dataset:
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        return Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowInvalid, OSError) as fault:
        raise DataError(message("cannot read the parquet file", where=str(path), found=fault)) from fault


def _from_dicts(rows: list[Any], where: str) -> Dataset:
    """Rows of one shape: a key that only some rows have is a misspelling until shown otherwise."""
    import pyarrow
    from datasets import Dataset

    if not rows:
        raise DataError(message("the data is empty", where=where, found="0 rows"))
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                message(
                    "a row that is no record",
                    where=f"{where}, row {number}",
                    expected="names and values",
                    found=type(row).__name__,
                )
            )
    keys = Counter(frozenset(row) for row in rows)
    usual = keys.most_common(1)[0][0]
    for number, row in enumerate(rows):
        odd = set(row) ^ usual
        if odd:
            raise DataError(
                message(
                    "a row with other columns than the rest",
                    where=f"{where}, row {number}",
                    expected=", ".join(sorted(usual)),
                    found=", ".join(sorted(row)) or "nothing",
                    remedy=f"Check the spelling of {', '.join(sorted(odd))}, or fill every row.",
                )
            )
    for name in sorted(usual):
        kinds = Counter(
            "text" if isinstance(row[name], str) else type(row[name]).__name__ for row in rows if row[name] is not None
        )
        if len(kinds) > 1 and set(kinds) != {"int", "float"}:
            rare = kinds.most_common()[-1][0]
            number = next(
                n
                for n, row in enumerate(rows)
                if row[name] is not None
                and ("text" if isinstance(row[name], str) else type(row[name]).__name__) == rare
            )
            raise DataError(
                message(
                    "a column of mixed kinds",
                    where=f"{where}, row {number}, column {name!r}",
                    expected=kinds.most_common(1)[0][0],
                    found=f"{rare}: {rows[number][name]!r}"[:120],
                )
            )
    try:
        return Dataset.from_list([dict(row) for row in rows])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as fault:
        raise DataError(message("rows of different shapes", where=where, found=fault)) from fault


def rename(rows: Dataset, columns: Mapping[str, str] | None, known: Mapping[str, str]) -> Dataset:
    """Give the task's column names to a source's columns.

    Args:
        rows: the source.
        columns: task column -> source column; the only renaming there is.
        known: the task's columns and what they hold.

    Raises:
        RequestError: a column that the task does not know, or that the source lacks.
    """
    if not columns:
        return rows
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
    return rows.remove_columns(dropped).rename_columns({f: w for f, w in taken.items() if f != w})


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
    for index, value in enumerate(values):
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
    return list(values)


def fingerprint(rows: Dataset) -> dict[str, Any]:
    """The identity of rows: their number, columns, and a sha256 over every value in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode())
        digest.update(b"\n")
    return {"rows": len(rows), "columns": list(rows.column_names), "sha256": digest.hexdigest()}
