"""What stands in the label column: names, class numbers, lists of them, or numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, message, nearest

if TYPE_CHECKING:
    from datasets import Dataset

NUMBER = re.compile(r"[-+]?\d+(\.\d+)?")
SEPARATOR = "|"  # between the labels of one cell, where a multi-label set comes from a csv file


def named(rows: Dataset, value: Any, column: str = "label") -> Any:
    """Class numbers of a ClassLabel feature as names."""
    names = class_names(rows, column)
    if names and isinstance(value, list):
        return [names[entry] if 0 <= entry < len(names) else None for entry in value]
    if names and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None
    return value


def one_name(labels: Sequence[str]) -> str:
    """The fault of a choice between one label, in words; empty where there are more."""
    if len(labels) != 1:
        return ""
    return message(
        "one label alone: every answer would be the same",
        where="labels",
        expected="two or more",
        found=repr(labels[0]),
        remedy="Name the other label too, or say problem='multi-label' for a label that a row has or has not.",
    )


def refuse_one_class(present: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse training rows that all have one label: there is nothing to tell apart, and the loss is 0 at once.

    Args:
        present: the labels that the rows have, each once.
        labels: all that the task knows.

    Raises:
        DataError: naming the label.
    """
    if len(present) == 1:
        others = [label for label in labels if label not in present]
        raise DataError(
            message(
                f"every training row has the label {present[0]!r}",
                where="column 'label'",
                expected=f"rows of {', '.join(others[:6])} too" if others else "rows of two labels or more",
                remedy="Look at the column and at which rows are taken (columns, limit).",
            )
        )


def names_in(value: Any, row: int, labels: Sequence[str], *, many: bool, check: bool = True) -> list[str]:
    """The label names of one cell.

    Args:
        value: the cell.
        row: its row, for the message.
        labels: the known names.
        many: whether a row has several labels.
        check: refuse names that are not known.

    Raises:
        DataError: a label that is missing, unknown, or a number where a name is needed.
    """
    where = f"row {row}, column 'label'"
    cell = value
    if many:
        if isinstance(value, str):
            cell = _cell(value, where)
        if not isinstance(cell, list | tuple):
            raise DataError(
                message(
                    "not a list of labels",
                    where=where,
                    expected=f"names, or names divided by {SEPARATOR!r}",
                    found=repr(value)[:80],
                )
            )
    else:
        cell = [value]
    names = []
    for entry in cell:
        if entry is None or entry == "":
            raise DataError(message("the label is missing", where=where, remedy="Fill or remove the row."))
        name = str(entry)
        if check and name not in labels:
            if isinstance(entry, int | float):
                raise DataError(
                    message(
                        f"the number {entry!r} where a label's name is needed",
                        where=where,
                        expected=f"one of {', '.join(labels[:6])}{' ...' if len(labels) > 6 else ''}",
                        remedy="Use names, or a data set whose label column is a ClassLabel.",
                    )
                )
            raise DataError(message(f"unknown label {name!r}", where=where, remedy=nearest(name, labels)))
        names.append(name)
    return names


def one_kind(first: Mapping[str, int]) -> None:
    """Refuse labels read off the rows of which some are numbers and some are words: two codings in one column.

    Args:
        first: label name -> the first row that has it.

    Raises:
        DataError: with the first row of the rarer kind.
    """
    numbers = [name for name in first if NUMBER.fullmatch(name)]
    words = [name for name in first if name not in numbers]
    if numbers and words:
        rare = min(numbers, words, key=len)
        shown = " and ".join(
            ", ".join(sorted(kind)[:3]) + (" ..." if len(kind) > 3 else "") for kind in (numbers, words)
        )
        raise DataError(
            message(
                f"the label {rare[0]!r} among {'words' if rare is numbers else 'numbers'}",
                where=f"row {first[rare[0]]}, column 'label'",
                expected="names of one kind",
                found=shown,
                remedy="Mend the rows, or give labels=[...] if all of these are meant.",
            )
        )


def number_in(value: Any, row: int) -> float:
    """The number of a regression's cell.

    Raises:
        DataError: not a finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if number != number or abs(number) == float("inf"):
        raise DataError(
            message("not a number", where=f"row {row}, column 'label'", expected="a number", found=repr(value)[:80])
        )
    return number


def _cell(text: str, where: str) -> Any:
    """The labels of a csv cell: a JSON list, or names divided by the separator."""
    if not text.startswith("["):
        return [part.strip() for part in text.split(SEPARATOR) if part.strip()]
    try:
        return json.loads(text)
    except ValueError as fault:
        raise DataError(message("broken JSON", where=where, found=f"{text!r}: {fault}"[:120])) from fault


def class_names(rows: Dataset, column: str = "label") -> list[str]:
    """The names of a ClassLabel feature, or of a list of them; empty for any other."""
    feature = rows.info.features[column]  # `rows.features` copies all of them, which a call a row cannot bear
    names: list[str] = getattr(getattr(feature, "feature", feature), "names", None) or []
    return names
