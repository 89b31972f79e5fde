"""SQuAD's questions: nested articles to rows, answers to lists of texts and starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adapters.errors import DataError, message


def is_nested(records: Sequence[Any]) -> bool:
    """Whether the one record of a file holds SQuAD's articles under "data"."""
    articles = records[0].get("data") if len(records) == 1 and isinstance(records[0], Mapping) else None
    return (
        isinstance(articles, list)
        and bool(articles)
        and isinstance(articles[0], Mapping)
        and "paragraphs" in articles[0]
    )


def flattened(record: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """One row a question: id, title, question, context, answers; of an impossible question no answers.

    Args:
        record: {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}.
        where: the file's name, for the message.

    Raises:
        DataError: a paragraph without its fields, with article and paragraph.
    """
    made: list[dict[str, Any]] = []
    for number, article in enumerate(record["data"]):
        spot = f"{where}, article {number}"
        try:
            for place, paragraph in enumerate(article["paragraphs"]):
                spot = f"{where}, article {number}, paragraph {place}"
                made += [_row(article, paragraph, entry, spot) for entry in paragraph["qas"]]
        except (KeyError, TypeError, AttributeError) as fault:
            raise DataError(
                message(
                    "a paragraph that is not SQuAD's",
                    where=spot,
                    expected="a context, and qas with id, question and answers",
                    found=f"{type(fault).__name__}: {fault}",
                )
            ) from fault
    return made


def _row(
    article: Mapping[str, Any], paragraph: Mapping[str, Any], entry: Mapping[str, Any], where: str
) -> dict[str, Any]:
    return {
        "id": str(entry["id"]),
        "title": article.get("title", ""),
        "question": entry["question"],
        "context": paragraph["context"],
        "answers": as_lists(entry.get("answers"), f"{where}, question {entry['id']!r}"),
    }


def as_lists(cell: Any, where: str) -> dict[str, list[Any]]:
    """Answers as {"text": [...], "answer_start": [...]}, from that or from a list of single answers.

    Raises:
        DataError: another form, not as many starts as texts, or other values than texts and whole numbers.
    """
    made = paired(cell, where)
    if not all(isinstance(one, str) for one in made["text"]) or not all(
        isinstance(one, int) for one in made["answer_start"]
    ):
        raise _another_form(made, where)
    return made


def paired(cell: Any, where: str) -> dict[str, list[Any]]:
    """The same, whatever the lists hold.

    Raises:
        DataError: another form, or not as many starts as texts.
    """
    if cell is None:
        cell = []
    if isinstance(cell, list) and all(isinstance(one, Mapping) for one in cell):
        cell = {key: [one.get(key) for one in cell] for key in ("text", "answer_start")}
    texts, starts = (cell.get("text"), cell.get("answer_start")) if isinstance(cell, Mapping) else (None, None)
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise _another_form(cell, where)
    return {"text": texts, "answer_start": starts}


def _another_form(cell: Any, where: str) -> DataError:
    return DataError(
        message(
            "answers of another form",
            where=where,
            expected='{"text": [...], "answer_start": [...]}, as many of each',
            found=repr(cell)[:80],
        )
    )
