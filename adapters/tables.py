"""Tables in files and in memory: csv, tsv, json, jsonl, parquet, lists of records.

Values stay as they are written: none is guessed to be missing, no column to be a number.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from adapters import jsontext
from adapters.errors import DataError, message

if TYPE_CHECKING:
    from datasets import Dataset

BOM = b"\xef\xbb\xbf"
csv.field_size_limit(1 << 30)  # characters; a long text is one field


def text_of(path: Path) -> str:
    """The text of a utf-8 file, unpacked where it ends in .gz, without a byte order mark; line ends as they stand.

    Raises:
        DataError: a damaged archive, or bytes that are no utf-8, with their line.
    """
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as fault:
        raise DataError(message("cannot read the file", where=str(path), found=" ".join(str(fault).split()))) from fault
    content = content.removeprefix(BOM)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as fault:
        start = content.rfind(b"\n", 0, fault.start) + 1
        line = content.count(bytes([10]), 0, fault.start) + 1
        refuse_bytes(path, line, fault.start - start + 1, fault)


def refuse_bytes(path: Path, line: int, place: int, fault: UnicodeDecodeError) -> NoReturn:
    """Refuse a file that is no utf-8.

    Args:
        path: the file.
        line, place: of the byte, from 1; the place within its line.
        fault: at the byte.

    Raises:
        DataError: naming the byte.
    """
    raise DataError(
        message(
            "the file is not utf-8",
            where=f"{path}, line {line}, byte {place}",
            expected="utf-8 text",
            found=f"the byte 0x{fault.object[fault.start]:02x}",
            remedy="Save the file as utf-8.",
        )
    ) from fault


def read_csv(path: Path) -> Dataset:
    """A table as it is written: all is text, "NA" and "null" too, and each row has as many fields as the header.

    Raises:
        DataError: not utf-8, another separator, a column twice, a ragged row, an open quote, no rows; with the line.
    """
    from datasets import Dataset

    rows = [fields for _, fields in csv_rows(io.StringIO(text_of(path), newline=""), path)]
    if len(rows) < 2:
        raise DataError(message("the data is empty", where=str(path), found="a header and 0 rows"))
    return Dataset.from_dict({column: [row[index] for row in rows[1:]] for index, column in enumerate(rows[0])})


def csv_rows(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """The header of a table and then its rows, as they are read; each with the line that it ends in.

    Args:
        lines: of the file, with their ends.
        path: of the file; its name tells the separator.

    Raises:
        DataError: as `read_csv`, but for a table without rows.
    """
    separator, other = ("\t", ",") if path.name.lower().removesuffix(".gz").endswith(".tsv") else (",", "\t")
    header: list[str] = []
    count = 0
    reader = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for row in reader:
            if not row:
                continue
            if not header:
                _check_header(row, path, separator, other)
                header = row
            elif len(row) != len(header):
                raise DataError(
                    message(
                        "a row with another number of fields than the header",
                        where=f"{path}, line {reader.line_num}",
                        expected=f"{len(header)} fields",
                        found=f"saw {len(row)}",
                        remedy="Put texts that hold the separator into double quotes.",
                    )
                )
            count += 1
            yield reader.line_num, row
    except csv.Error as fault:
        raise DataError(
            message(
                "cannot read the table",
                where=f"{path}, row {count}, line {reader.line_num}",
                expected="fields in double quotes where they hold the separator",
                found=" ".join(str(fault).split()),
            )
        ) from fault


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
    check_names(header, path)


def check_names(names: list[str], path: Path) -> None:
    """Refuse a column that stands twice.

    Raises:
        DataError: naming it.
    """
    twice = [name for name, times in Counter(names).items() if times > 1]
    if twice:
        raise DataError(message(f"the column {twice[0]!r} stands twice", where=str(path)))


def read_json(path: Path) -> list[Any]:
    """The records of a file that is one list, one record a line, or one record around lists of records.

    Raises:
        DataError: broken JSON, a key twice, NaN or Infinity (which are no JSON); with the line, or row and column.
    """
    text = text_of(path)
    marks: list[str] = []
    decoder = json_decoder(marks)
    rows: list[Any] = []
    if text.lstrip().startswith("["):
        try:
            rows = decoder.decode(text)
        except ValueError as fault:
            raise DataError(message("broken JSON", where=str(path), found=fault)) from fault
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(decoder.decode(line))
                except ValueError as fault:
                    whole = _whole(decoder, text) if not rows else None
                    if whole is not None:
                        rows = [whole]
                        break
                    raise DataError(message("broken JSON", where=f"{path}, line {number}", found=fault)) from fault
    if marks:
        refuse_marks(enumerate(rows), str(path), "row", marks[0])
    return rows


def json_decoder(marks: list[str]) -> json.JSONDecoder:
    """Reads JSON in which no key stands twice; NaN and Infinity, which are no JSON, are added to `marks`."""

    def constant(word: str) -> float:
        marks.append(word)
        return float(word)

    return json.JSONDecoder(object_pairs_hook=jsontext.record, parse_constant=constant)


def _whole(decoder: json.JSONDecoder, text: str) -> dict[str, Any] | None:
    """The one object around lists of records that a file is, written over several lines."""
    try:
        found = decoder.decode(text)
    except ValueError:
        return None
    values = found.values() if isinstance(found, dict) else []
    return found if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in values) else None


def refuse_marks(rows: Iterable[tuple[int, Any]], where: str, unit: str, mark: str) -> None:
    """Refuse the number that is none.

    Args:
        rows: with their numbers.
        where, unit: the file, and what of it the numbers count: "row", "line".
        mark: what stands there.

    Raises:
        DataError: naming the row and the column.
    """

    def holds(value: Any) -> bool:
        if isinstance(value, Mapping):
            return any(holds(inner) for inner in value.values())
        if isinstance(value, list):
            return any(holds(inner) for inner in value)
        return isinstance(value, float) and (value != value or abs(value) == float("inf"))

    for number, row in rows:
        for column, value in row.items() if isinstance(row, Mapping) else [("", row)]:
            if holds(value):
                raise DataError(
                    message(
                        "not a finite number",
                        where=f"{where}, {unit} {number}, column {column!r}",
                        expected="a number, or null where there is none",
                        found=mark,
                        remedy="Fill or remove the row.",
                    )
                )


def read_parquet(path: Path) -> Dataset:
    """A parquet file, with the features that `datasets` wrote into it.

    Raises:
        DataError: no parquet file, or a column twice.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Dataset

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowInvalid, OSError) as fault:
        raise DataError(message("cannot read the parquet file", where=str(path), found=fault)) from fault
    check_names(table.column_names, path)
    return Dataset(table)


def from_dicts(rows: list[Any], where: str) -> Dataset:
    """Rows of one shape: a key that only some rows have is a misspelling until shown otherwise.

    Args:
        rows: one mapping a row.
        where: their source, for the message.

    Raises:
        DataError: no rows, a row that is no record, other columns than the rest, a column of mixed kinds; with the row.
    """
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
        kinds = Counter(_kind(row[name]) for row in rows if row[name] is not None)
        if len(kinds) > 1 and set(kinds) != {"int", "float"}:
            rare = kinds.most_common()[-1][0]
            number = next(n for n, row in enumerate(rows) if row[name] is not None and _kind(row[name]) == rare)
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


def _kind(value: Any) -> str:
    return "text" if isinstance(value, str) else type(value).__name__
