"""Tags of words: how they mark entities, which of them follow no rule, what they say in groups."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, RequestError, message, nearest
from adapters.labels import class_names, named

if TYPE_CHECKING:
    from datasets import Dataset

OUTSIDE = "O"  # the tag of a word that belongs to no entity
MARKED = re.compile(r"([BIESLU])-(.+)")  # begin, inside, end, single; BILOU says last and unit
CONLL = {"L": "E", "U": "S"}  # the letters that seqeval knows, for those that it does not
UNSEEN = -1  # stands for the token of a word that was cut off or became none


def scheme_of(labels: Sequence[str]) -> str:
    """How a set of tags marks entities: "BIO" (IOB1 too), "BIOES", "BILOU", "IO", or "plain" where it marks none.

    Raises:
        RequestError: tags of which some have a B- or I- before them and some have not.
    """
    marks = {found[1] for found in map(MARKED.fullmatch, labels) if found}
    bare = [label for label in labels if label != OUTSIDE and not MARKED.fullmatch(label)]
    if marks and bare:
        raise RequestError(
            message(
                "tags of two kinds",
                where="labels",
                expected=f"{OUTSIDE} and tags that begin with B- or I- (E-, S-), or none of these",
                found=f"{bare[0]!r} among them",
            )
        )
    if not marks:
        return "IO" if OUTSIDE in labels else "plain"
    if marks & {"L", "U"}:
        return "BILOU"
    return "BIOES" if marks & {"E", "S"} else "BIO"


def conll(label: str) -> str:
    """A tag in the letters of the CoNLL evaluation: BILOU's as BIOES, a bare one as I-."""
    found = MARKED.fullmatch(label)
    if label == OUTSIDE or found is None:
        return label if label == OUTSIDE else f"I-{label}"
    return f"{CONLL.get(found[1], found[1])}-{found[2]}"


def remarks_on(sentences: Iterable[Sequence[str]], scheme: str) -> list[str]:
    """What is said once about tags: a scheme other than BIO, and how many tags follow none of its rules."""
    if scheme in ("plain", "IO"):
        return [] if scheme == "plain" else ["tags are IO: neighbouring words of one tag are read as one entity"]
    total, begun = 0, Counter[str]()
    odd: dict[str, list[int]] = {"BIO": [], "IOB1": [], "closed": []}
    for row, tags in enumerate(sentences):
        total += len(tags)
        letter, kind = OUTSIDE, ""
        for tag in (*map(conll, tags), OUTSIDE):
            after, same = letter, kind
            letter, _, kind = tag.partition("-")
            goes_on = letter in ("I", "E") and after in ("B", "I") and kind == same
            apart = kind != same or after == OUTSIDE
            if letter in ("I", "E") and not goes_on:
                odd["BIO"].append(row)
            if letter in ("B", "I") and apart:
                begun[letter] += 1
            if letter == "B" and apart:
                odd["IOB1"].append(row)
            if after in ("B", "I") and not goes_on and letter not in ("I", "E"):
                odd["closed"].append(row)
    if scheme == "BIO":
        name = "IOB1" if begun["I"] > begun["B"] else "BIO"
        rows = odd[name]
    else:
        name, rows = scheme, sorted(odd["BIO"] + odd["closed"])
    said = {
        "IOB1": ["tags are IOB1: an entity begins with I-, B- only parts neighbours of one kind"],
        "BIOES": ["tags are BIOES: groups of answers part at E- and S-, as transformers' pipeline parts them"],
        "BILOU": ["tags are BILOU: groups of answers part at L- and U-, as transformers' pipeline parts them"],
    }.get(name, [])
    if rows:
        said.append(
            f"{len(rows)} of {total} tags follow no rule of {name}, first in row {rows[0]}: read as the CoNLL "
            "evaluation reads them"
        )
    return said


# ---------------------------------------------------------------------- the rows


def found_in(rows: Dataset) -> tuple[str, ...]:
    """The tags that training rows hold: the feature's own order, else O first and the others sorted.

    Raises:
        DataError: tags that are no names.
    """
    names = class_names(rows, "tags")
    if names:
        return tuple(names)
    found: set[str] = set()
    for number, cell in enumerate(rows["tags"][:]):
        found |= set(tags_in(cell, number, None))
    return tuple(sorted(found, key=lambda tag: (tag != OUTSIDE, tag)))


def words_in(cell: Any, row: int) -> list[str]:
    """The words of a row.

    Raises:
        DataError: no list of words, or an empty one.
    """
    where = f"row {row}, column 'tokens'"
    if not isinstance(cell, list | tuple) or not cell:
        raise DataError(message("not a list of words", where=where, expected="one word or more", found=repr(cell)[:80]))
    for position, word in enumerate(cell):
        if not isinstance(word, str):
            raise DataError(message("a word that is not text", where=f"{where}, word {position}", found=repr(word)))
    return list(cell)


def tags_in(cell: Any, row: int, labels: Sequence[str] | None, words: int | None = None) -> list[str]:
    """The tags of a row.

    Args:
        cell: names (class numbers have become names already).
        row: its number, for the message.
        labels: the known tags; None takes every name.
        words: how many words the row has; None takes every number.

    Raises:
        DataError: not a tag for each word, a tag that is missing, unknown or a number.
    """
    where = f"row {row}, column 'tags'"
    if not isinstance(cell, list | tuple):
        raise DataError(message("not a list of tags", where=where, expected="a tag a word", found=repr(cell)[:80]))
    if words is not None and len(cell) != words:
        raise DataError(message("not one tag for each word", where=where, expected=f"{words} tags", found=len(cell)))
    for position, tag in enumerate(cell):
        place = f"{where}, word {position}"
        if tag is None or tag == "":
            raise DataError(message("the tag is missing", where=place, remedy="Fill or remove the row."))
        if not isinstance(tag, str):
            raise DataError(
                message(
                    f"the number {tag!r} where a tag's name is needed",
                    where=place,
                    remedy="Use names, or a data set whose tags are a list of ClassLabel.",
                )
            )
        if labels is not None and tag not in labels:
            raise DataError(message(f"unknown tag {tag!r}", where=place, remedy=nearest(tag, labels)))
    return list(cell)


def check(rows: Dataset, labels: Sequence[str], *, labelled: bool) -> None:
    """Look at the words and tags of every row.

    Raises:
        DataError: with row, column and word.
    """
    cells = rows["tags"] if labelled else rows["tokens"]
    for number, (cell, tags) in enumerate(zip(rows["tokens"], cells, strict=True)):
        if isinstance(cell, str) and not labelled:
            if not cell.strip():
                raise DataError(message("an empty text", where=f"row {number}, column 'tokens'", found=repr(cell)))
            continue
        words = words_in(cell, number)
        if labelled:
            tags_in(named(rows, tags, "tags"), number, labels, len(words))


# ---------------------------------------------------------------------- answers


def grouped(
    pieces: Sequence[Mapping[str, Any]], join: Callable[[list[str]], str], ignored: str = OUTSIDE
) -> list[dict[str, Any]]:
    """Neighbouring tokens of one kind as one entity, as transformers' pipeline groups them (strategy "simple").

    Args:
        pieces: tokens with entity (the tag), score, word, start, end.
        join: makes one text of tokens.
        ignored: the kind that is left out.

    Returns:
        entity_group, score (the mean), word, start and end (characters) of each.
    """
    groups: list[list[Mapping[str, Any]]] = []
    last = ""
    for piece in pieces:
        tag = piece["entity"]
        kind = tag[2:] if tag.startswith(("B-", "I-")) else tag
        if groups and kind == last and not tag.startswith("B-"):
            groups[-1].append(piece)
        else:
            groups.append([piece])
        last = kind
    made = [
        {
            "entity_group": group[0]["entity"].split("-", 1)[-1],
            "score": float(sum(piece["score"] for piece in group) / len(group)),
            "word": join([piece["word"] for piece in group]),
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]
    return [group for group in made if group["entity_group"] != ignored]
