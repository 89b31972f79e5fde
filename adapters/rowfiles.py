"""Table files read row by row, as they are written, so that none of them is ever held whole."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast, final

from adapters import tables
from adapters.errors import DataError, RequestError, message
from adapters.sources import refuse_columns, suffix

KINDS: Final = "jsonl, json with one record a line, csv, tsv (.gz too) or parquet"
BATCH: Final = 128  # rows of a parquet file that are unpacked at once
BEGIN: Final = 1 << 20  # bytes of a file whose lines are counted
LOOK: Final = 256  # bytes of a file that tell whether it is one list


@final
@dataclass(frozen=True)
class RowFiles:
    """The rows of files with the same columns, one file after the other.

    Attributes:
        files: in their order.
        columns: that every row has; None before they are known.
    """

    files: tuple[Path, ...]
    columns: frozenset[str] | None = None

    def shard(self, num_shards: int, index: int) -> RowFiles:
        """Every n-th file from one on, by the names that `datasets` gives the arguments."""
        return RowFiles(self.files[index::num_shards], self.columns)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The rows, read anew each time.

        Raises:
            DataError: a file that cannot be read, a row that is broken or has other columns; with its line.
        """
        for file in self.files:
            unit = "row" if suffix(file) == "parquet" else "line"
            for number, row in rows_of(file):
                if self.columns is not None and row.keys() != self.columns:
                    odd = ", ".join(sorted(row.keys() ^ self.columns))
                    raise DataError(
                        message(
                            "a row with other columns than the rest",
                            where=f"{file}, {unit} {number}",
                            expected=", ".join(sorted(self.columns)),
                            found=", ".join(sorted(row)) or "nothing",
                            remedy=f"Check the spelling of {odd}, or fill every row.",
                        )
                    )
                yield row


def rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file as they are read, with their lines; of a parquet file with their numbers, from 0.

    Raises:
        RequestError: a kind of file that is not read row by row.
        DataError: a file that cannot be read, or a row that is broken; with its line.
    """
    kind = suffix(file)
    if kind == "parquet":
        yield from enumerate(_unpacked(file))
    elif kind in ("csv", "tsv"):
        yield from _fields(file)
    elif kind in ("json", "jsonl"):
        yield from _records(file)
    else:
        remedy = "Save the rows as jsonl, or leave streaming out: then the file is read whole."
        raise RequestError(
            message("a kind of file that is not read row by row", where=str(file), expected=KINDS, remedy=remedy)
        )


def features_of(files: tuple[Path, ...]) -> Any:
    """What `datasets` has written into parquet files of their columns (the names of classes); None for any other.

    Raises:
        DataError: files whose columns differ.
    """
    import pyarrow
    import pyarrow.parquet
    from datasets import Features

    found: Any = None
    for file in files:
        if suffix(file) != "parquet":
            return None
        try:
            schema = pyarrow.parquet.read_schema(file)
        except (pyarrow.ArrowInvalid, OSError) as fault:
            raise _unreadable_parquet(file, fault) from fault
        tables.check_names(schema.names, file)
        own = Features.from_arrow_schema(schema)
        if found is not None and own != found:
            refuse_columns(file, files[0], own, found)
        found = own
    return found


def about(file: Path) -> int:
    """How many rows a file has: of parquet as it says, of any other by the lines at its beginning."""
    import pyarrow.parquet

    if suffix(file) == "parquet":
        rows: int = pyarrow.parquet.read_metadata(file).num_rows
        return rows
    size = file.stat().st_size
    with file.open("rb") as packed, gzip.open(packed) if file.name.lower().endswith(".gz") else packed as raw:
        begin = raw.read(BEGIN)
        passed = packed.tell()
    lines = begin.count(b"\n") + (not begin.endswith(b"\n") and len(begin) < BEGIN)
    header = suffix(file) in ("csv", "tsv")
    return max(0, round(lines * size / max(1, min(passed, size))) - header)


# ---------------------------------------------------------------------- kinds of files


def _opened(file: Path) -> AbstractContextManager[BinaryIO]:
    opener = gzip.open if file.name.lower().endswith(".gz") else open
    return cast("AbstractContextManager[BinaryIO]", opener(file, "rb"))


def _lines(file: Path) -> Iterator[str]:
    """The lines of a file, with their ends."""
    number = 0
    try:
        with _opened(file) as raw:
            for number, line in enumerate(raw, 1):
                if number == 1:
                    line = line.removeprefix(tables.BOM)
                yield line.decode("utf-8")
    except UnicodeDecodeError as fault:
        tables.refuse_bytes(file, number, fault.start + 1, fault)
    except (OSError, EOFError, zlib.error) as fault:
        where = f"{file}, behind line {number}" if number else str(file)
        raise DataError(message("cannot read the file", where=where, found=" ".join(str(fault).split()))) from fault


def _records(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """One record a line; what is one list would have to be held whole."""
    marks: list[str] = []
    decoder = tables.json_decoder(marks)
    _refuse_list(file)
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = decoder.decode(line)
        except ValueError as fault:
            raise DataError(message("broken JSON", where=where, found=fault)) from fault
        if marks:
            tables.refuse_marks([(number, row)], str(file), "line", marks[0])
        if not isinstance(row, dict):
            found = type(row).__name__
            raise DataError(message("a row that is no record", where=where, expected="names and values", found=found))
        yield number, row


def _refuse_list(file: Path) -> None:
    try:
        with _opened(file) as raw:
            begin = raw.read(LOOK).removeprefix(tables.BOM).lstrip()
    except (OSError, EOFError, zlib.error):
        return  # told where the lines are read
    if begin.startswith(b"["):
        remedy = "Save one record a line (.jsonl), or leave streaming out: then the file is read whole."
        raise DataError(
            message("one list of records", where=str(file), expected="a record a line", found="'['", remedy=remedy)
        )


def _fields(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table; every value is the text that it is."""
    header: list[str] = []
    for line, fields in tables.csv_rows(_lines(file), file):
        if header:
            yield line, dict(zip(header, fields, strict=True))
        else:
            header = fields


def _unpacked(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, some at a time, row group after row group: each of these is packed as one."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file, pre_buffer=False) as opened:  # it would fetch all of them at once
            for group in range(opened.num_row_groups):
                for batch in opened.iter_batches(batch_size=BATCH, row_groups=[group]):
                    yield from batch.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as fault:
        raise _unreadable_parquet(file, fault) from fault


def _unreadable_parquet(file: Path, fault: Exception) -> DataError:
    return DataError(message("cannot read the parquet file", where=str(file), found=fault))
