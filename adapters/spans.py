"""The right answers of questions, each compared with the piece of the context that it should be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from adapters.data import need_column
from adapters.errors import DataError, message
from adapters.squad import paired

if TYPE_CHECKING:
    from datasets import Dataset


def right_answers(rows: Dataset) -> Iterator[list[tuple[str, int]]]:
    """The right answers of each row with the character at which each begins; none where there is no answer.

    Raises:
        DataError: no column of answers, another form, an answer that does not stand at its start.
    """
    if "answers" in rows.column_names:
        cells, column = rows["answers"], "answers"
    else:
        need_column(rows, "answer" if "answer" in rows.column_names else "answers")
        need_column(rows, "answer_start")
        cells, column = zip(rows["answer"], rows["answer_start"], strict=True), "answer"
    for number, (cell, context) in enumerate(zip(cells, rows["context"], strict=True)):
        where = f"row {number}, column {column!r}"
        if column == "answers":
            pairs = list(zip(*paired(cell, where).values(), strict=True))
        else:
            pairs = [cell] if cell[0] not in (None, "") else []
        yield [_checked(text, start, context, where) for text, start in pairs]


def _checked(text: Any, start: Any, context: str, where: str) -> tuple[str, int]:
    """One answer, compared with the context.

    Raises:
        DataError: not text, no number, or another text at its start; where it stands instead, if it stands once.
    """
    if not isinstance(text, str) or not text.strip():
        raise DataError(
            message(
                "an answer that is not text", where=where, found=repr(text)[:80], remedy="Empty lists say no answer."
            )
        )
    if isinstance(start, str) and start.strip().isdecimal():
        start = int(start)
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise DataError(
            message("not the number of a character", where=f"{where}, answer_start", found=repr(start)[:80])
        )
    there = context[start : start + len(text)]
    if there != text:
        times = context.count(text)
        begin = context.find(text)
        once = f"It stands once, at {begin}: put that into answer_start."
        raise DataError(
            message(
                "the answer does not stand at its start",
                where=f"{where}, answer_start {start}",
                expected=repr(text)[:80],
                found=repr(there)[:80],
                remedy=once
                if times == 1
                else f"It stands {times} times in the context."
                if times
                else "It does not stand in the context.",
            )
        )
    return text, start
