"""The formats that rows come in, recognised by their columns, and the task's columns made of them."""

from __future__ import annotations

import statistics
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

from adapters import conversations, squad
from adapters.data import rename
from adapters.errors import DataError, RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = 20  # rows that are looked into to tell a format


@final
@dataclass(frozen=True)
class Format:
    """How rows say what they say.

    Attributes:
        name: as it is announced.
        needs: the columns that it is recognised by.
        gives: the task columns that come of it.
        answer: of `needs`, the column that rows to be predicted lack.
        may: further columns that it reads where they are there.
        sharegpt: of lists of turns, whether they say from and value (True) or role and content; None for no turns.
        convert: checks the rows and makes the task's columns; None where every value may stand as it is.
    """

    name: str
    needs: frozenset[str]
    gives: frozenset[str]
    answer: str = ""
    may: frozenset[str] = frozenset()
    sharegpt: bool | None = None
    convert: Callable[[Dataset, Format], tuple[Dataset, str]] | None = None


def detect(
    column_names: Collection[str],
    sample: Sequence[Mapping[str, Any]],
    known: Collection[str] | None = None,
    chosen: Collection[str] = (),
) -> Format | None:
    """The format of rows.

    A reading that uses more of the columns beats one that uses a part of them; one with its answers beats one without.

    Args:
        column_names: the rows' columns.
        sample: some rows, to look into lists of turns; they may lack the other columns.
        known: the columns that the task takes; None for any task.
        chosen: columns that the user named on purpose; they decide between readings.

    Returns:
        None where no format is recognised.

    Raises:
        RequestError: several readings; the message says how to choose.
    """
    there = set(column_names)
    whole: dict[frozenset[str], Format] = {}  # the columns that a reading uses -> the first such reading
    bare: dict[frozenset[str], Format] = {}
    for form in FORMATS:
        if known is not None and not form.gives <= set(known):
            continue
        if form.sharegpt is not None and form.needs <= there:
            (column,) = form.needs
            if conversations.is_sharegpt([row[column] for row in sample]) is not form.sharegpt:
                continue
        for readings, wanted in ((whole, form.needs), (bare, form.needs - {form.answer})):
            if wanted and wanted <= there:
                readings.setdefault(wanted, form)
    # What uses a part of another reading's columns is that reading told worse, rows without answers included.
    used = [*whole, *bare]
    found = {columns: form for columns, form in whole.items() if not any(columns < other for other in used)}
    found = found or {columns: form for columns, form in bare.items() if not any(columns < other for other in used)}
    if len(found) > 1 and chosen:
        scores = {
            columns: (len(columns & set(chosen)), len(form.gives & set(chosen))) for columns, form in found.items()
        }
        found = {columns: form for columns, form in found.items() if scores[columns] == max(scores.values())}
    if len(found) > 1:
        (columns, form), *_ = found.items()
        column = min(columns)
        raise RequestError(
            message(
                "the rows can be read in several ways",
                where=f"columns {', '.join(column_names)}",
                found=" and ".join(other.name for other in found.values()),
                remedy=f"Name a column of the one you mean, e.g. columns={{{column!r}: {column!r}}} for {form.name}.",
            )
        )
    return next(iter(found.values()), None)


def normalise(rows: Dataset, known: Collection[str], chosen: Collection[str] = ()) -> tuple[Dataset, str]:
    """The task's columns, made of whatever format the rows are in; what is in them already stays as it is.

    Args:
        rows: raw rows.
        known: the columns that the task takes.
        chosen: columns that the user named on purpose; they decide between readings.

    Returns:
        The rows, and a remark ("detected: sharegpt, 1200 rows, median 3 turns"), empty where no format is recognised:
        a task of a user's own may take any columns.

    Raises:
        DataError: a row that does not fit its format, with its number; rows of a format that the task does not take.
        RequestError: several readings, or a source language to be named.
    """
    turns = [name for name in conversations.TURNS if name in rows.column_names]
    sample = rows.select(range(min(SAMPLE, len(rows)))).select_columns(turns).to_list() if turns else []
    form = detect(rows.column_names, sample, known, chosen)
    if form is None:
        _refuse_foreign(rows, known, sample)
        return rows, ""
    detail = ""
    if form.convert is not None:
        rows, detail = form.convert(rows, form)
    # What was read otherwise, or not chosen, must not be found again by the task or by a second look.
    rows = rows.remove_columns([name for name in rows.column_names if name in _readable(known) - form.gives])
    return rows, f"detected: {form.name}, {len(rows)} rows{detail}"


def _refuse_foreign(rows: Dataset, known: Collection[str], sample: Sequence[Mapping[str, Any]]) -> None:
    """Refuse rows that have none of the task's columns, but are clearly made for another task."""
    if set(known) & set(rows.column_names):
        return
    try:
        other = detect(rows.column_names, sample)
    except RequestError:  # of several other tasks: the task's own check names the column that it lacks
        return
    if other is not None:
        raise DataError(
            message(
                f"the rows are {other.name}, which the task does not take",
                where="data",
                expected=f"columns {', '.join(known)}",
                found=", ".join(rows.column_names),
                remedy="Choose the task that fits, or name the columns to read: columns={...}.",
            )
        )


def arrange(rows: Dataset, columns: Mapping[str, str] | None, known: Mapping[str, str]) -> tuple[Dataset, str]:
    """Rows as a task takes them: renamed as the user says, then brought from their format to the task's columns.

    Args:
        rows: the source.
        columns: task column (or a column of a format that becomes one) -> source column.
        known: the task's columns and what they hold.

    Returns:
        The rows, and the remark of `normalise`.

    Raises:
        DataError, RequestError: as `rename` and `normalise` do.
    """
    if columns:
        rows = _unfolded(rows, set(columns.values()))
        rows = rename(rows, columns, {**dict.fromkeys(sorted(_readable(known)), ""), **known})
    rows, remark = normalise(rows, known, tuple(columns or ()))
    return rename(rows, None, known), remark  # pictures become references or bytes, undecoded


def _readable(known: Collection[str]) -> set[str]:
    """Every column that some format reads for a task with these columns."""
    return set().union(*(form.needs | form.may for form in FORMATS if form.gives <= set(known)))


# ---------------------------------------------------------------------- from format to task


def _put(rows: Dataset, name: str, values: list[Any]) -> Dataset:
    """Rows with a column set."""
    # A name for the new state: datasets would pickle the whole column for one, which takes longer than all the rest.
    state = uuid.uuid4().hex
    if name not in rows.column_names:
        return rows.add_column(name, values, new_fingerprint=state)
    # The new column first: a data set that loses its last column loses its rows.
    free = "_" + max(rows.column_names, key=len)
    return rows.add_column(free, values, new_fingerprint=state).remove_columns(name).rename_column(free, name)


def _turns(rows: Dataset, form: Format) -> tuple[Dataset, str]:
    (column,) = form.needs
    made, dropped = conversations.read_turns(rows, column, sharegpt=bool(form.sharegpt))
    detail = f", median {statistics.median(map(len, made)):g} turns"
    if dropped:
        detail += f", not read of a turn: {', '.join(sorted(dropped))}"
    if column == "messages" and made == rows[column][:]:
        return rows, detail
    return _put(rows, "messages", made), detail


def _alpaca(rows: Dataset, form: Format) -> tuple[Dataset, str]:
    made = conversations.read_alpaca(rows)
    return _put(rows, "messages", made), f", median {statistics.median(map(len, made)):g} turns"


def _tags(rows: Dataset, form: Format) -> tuple[Dataset, str]:
    """One tag a token; ner_tags become tags and keep their ClassLabel, which names them."""
    if form.answer == "ner_tags" and "ner_tags" in rows.column_names:
        rows = rows.remove_columns([c for c in rows.column_names if c == "tags"]).rename_column("ner_tags", "tags")
    labelled = "tags" in rows.column_names
    for number, (words, marks) in enumerate(
        zip(rows["tokens"][:], rows["tags" if labelled else "tokens"][:], strict=True)
    ):
        fault, column, found = "", "tokens", words
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            fault = "not a list of words"
        elif not isinstance(marks, list) or len(marks) != len(words):
            fault, column, found = f"not one tag for each of {len(words)} tokens", "tags", marks
        if fault:
            raise DataError(message(fault, where=f"row {number}, column {column!r}", found=repr(found)[:80]))
    return rows, ""


def _answers(rows: Dataset, form: Format) -> tuple[Dataset, str]:
    """Ids as text (row numbers where there are none), answers as lists."""
    ids = [str(value) for value in rows["id"]] if "id" in rows.column_names else [str(n) for n in range(len(rows))]
    seen: dict[str, int] = {}
    for number, name in enumerate(ids):
        if seen.setdefault(name, number) != number:
            raise DataError(
                message(f"the id {name!r} stands twice", where=f"rows {seen[name]} and {number}, column 'id'")
            )
    if "id" not in rows.column_names or list(rows["id"]) != ids:
        rows = _put(rows, "id", ids)
    if "answers" not in rows.column_names:
        return rows, ""
    cells = rows["answers"][:]
    made = [squad.as_lists(cell, f"row {number}, column 'answers'") for number, cell in enumerate(cells)]
    without = sum(not cell["text"] for cell in made)
    detail = f", {without} without an answer" if without else ""
    return rows if made == cells else _put(rows, "answers", made), detail


def _languages(rows: Dataset, form: Format) -> tuple[Dataset, str]:
    """A translation does not say which side is the source."""
    languages = list(rows[0]["translation"])
    raise RequestError(
        message(
            "the rows do not say which language is the source",
            where="column 'translation'",
            found=", ".join(languages),
            remedy=f"Say it, e.g. columns={{'source': {languages[0]!r}, 'target': {languages[-1]!r}}}.",
        )
    )


def _unfolded(rows: Dataset, wanted: Collection[str]) -> Dataset:
    """{"translation": {"en": ..., "de": ...}} as columns "en" and "de", where these are asked for."""
    if "translation" not in rows.column_names or set(wanted) <= set(rows.column_names):
        return rows
    cells = rows["translation"][:]
    languages = list(cells[0]) if isinstance(cells[0], Mapping) else []
    if not set(languages) & set(wanted):
        return rows
    for language in languages:
        rows = _put(rows, language, [cell[language] for cell in cells])
    return rows.remove_columns("translation")


# ---------------------------------------------------------------------- the table


def _of(*names: str) -> frozenset[str]:
    return frozenset(names)


FORMATS: tuple[Format, ...] = (
    Format("text", _of("text"), _of("text")),
    Format("classification", _of("text", "label"), _of("text", "label"), "label"),
    Format("pairs", _of("text", "text_pair", "label"), _of("text", "text_pair", "label"), "label"),
    Format("pairs", _of("first", "second", "label"), _of("first", "second", "label"), "label"),
    Format("prompt and completion", _of("prompt", "completion"), _of("prompt", "completion"), "completion"),
    *(
        Format(name, _of(column), _of("messages"), may=_of("system"), sharegpt=sharegpt, convert=_turns)
        for column in conversations.TURNS
        for name, sharegpt in (("messages", False), ("sharegpt", True))
    ),
    Format(
        "alpaca",
        _of("instruction", "output"),
        _of("messages"),
        may=_of("input", "system", "history"),
        convert=_alpaca,
    ),
    Format("source and target", _of("source", "target"), _of("source", "target"), "target"),
    Format("translation", _of("translation"), _of("source", "target"), convert=_languages),
    Format("tokens and tags", _of("tokens", "tags"), _of("tokens", "tags"), "tags", convert=_tags),
    Format("tokens and ner_tags", _of("tokens", "ner_tags"), _of("tokens", "tags"), "ner_tags", convert=_tags),
    Format(
        "question answering",
        _of("question", "context", "answers"),
        _of("id", "question", "context", "answers"),
        "answers",
        may=_of("id"),
        convert=_answers,
    ),
    Format("images", _of("image", "label"), _of("image", "label"), "label"),
)
