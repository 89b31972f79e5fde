"""What tells rows apart, and one data set from another: digests of their content, whatever file it came from."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, message

if TYPE_CHECKING:
    from datasets import Dataset

# The identity of sets that are in memory, as long as they are.
_TAKEN: weakref.WeakKeyDictionary[Dataset, dict[str, Any]] = weakref.WeakKeyDictionary()


def identities(rows: Dataset, column: str) -> list[Any]:
    """What tells the values of a column apart: a text is itself, a list its JSON, a picture the digest of its bytes.

    Raises:
        DataError: the file of a picture that is no longer there.
    """
    from datasets import Image

    if not isinstance(rows.features[column], Image):
        return [json.dumps(cell) if isinstance(cell, list | dict) else cell for cell in rows[column][:]]
    cells = rows.select_columns(column).cast_column(column, Image(decode=False))[column]
    return [_picture_digest(cell, f"row {number}, column {column!r}") for number, cell in enumerate(cells)]


def fingerprint(rows: Dataset) -> dict[str, Any]:
    """The identity of rows: their number, columns, and a sha256 over every value in order; of a picture its bytes.

    Of a set whose values stand in its own table it is taken once: files may change, and what a transform of the
    caller's gives.

    Raises:
        DataError: the file of a picture that is no longer there.
    """
    from datasets import Image

    pictures = [name for name, feature in rows.features.items() if isinstance(feature, Image)]
    stays = not pictures and rows.format["type"] is None
    if stays and rows in _TAKEN:
        return dict(_TAKEN[rows])
    whole = rows
    columns = list(rows.column_names)
    for name in pictures:
        rows = rows.cast_column(name, Image(decode=False))
    digest = hashlib.sha256()
    for number, row in enumerate(rows):
        for name in pictures:
            row[name] = _picture_digest(row[name], f"row {number}, column {name!r}")
        digest.update(json.dumps(row, sort_keys=True, default=str, ensure_ascii=False).encode())
        digest.update(b"\n")
    found = {"rows": len(rows), "columns": columns, "sha256": digest.hexdigest()}
    if stays:
        _TAKEN[whole] = found
    return dict(found)


def _picture_digest(cell: Mapping[str, Any] | None, where: str) -> str | None:
    if cell is None:
        return None
    try:
        content = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    except OSError as fault:
        raise DataError(message("the picture cannot be read", where=where, found=fault)) from fault
    return hashlib.sha256(content).hexdigest()
