"""What rows hold: how many, which labels, how long the texts are, which rows are empty, repeated or unusable."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters.errors import AdaptersError, DataError
from adapters.identity import identities
from adapters.labels import named, names_in

if TYPE_CHECKING:
    from datasets import Dataset

ROW = re.compile(r"\brow (\d+)\b")
SHOWN = 5  # rows that a line names
MOST = 50  # rows that are looked for one by one
SAMPLE = 2000  # texts whose tokens are counted


@final
@dataclass(frozen=True)
class Lengths:
    """How long texts are.

    Attributes:
        unit: "tokens" by the backbone's own tokenizer, or "words".
        median, most: the middle one, and the longest.
        high: 95 of 100 are no longer.
        over: the share that is longer than the model takes; None where that is not known.
        counted: how many texts were looked at.
    """

    unit: str
    median: int
    high: int
    most: int
    over: float | None
    counted: int

    def __str__(self) -> str:
        return f"median {self.median} {self.unit}, 95 % up to {self.high}, longest {self.most}"


@final
@dataclass(frozen=True)
class Bad:
    """Rows of one part with one fault.

    Attributes:
        what: the fault, as the first of them has it.
        places: where they stand among the rows that were looked at; empty for a fault of the whole part.
        shown: the others of them in words.
        more: there may be more of them than were looked for.
    """

    what: str
    places: tuple[int, ...] = ()
    shown: str = ""
    more: bool = False

    def __str__(self) -> str:
        if len(self.places) < 2:
            return self.what
        count = f"at least {len(self.places)}" if self.more else str(len(self.places))
        return f"{self.what}{'' if self.what.endswith('.') else '.'} {count} rows are so, the others: {self.shown}"


@final
@dataclass(frozen=True)
class Part:
    """Rows of one part of a set, and the number that each of them has in the part as it was read."""

    rows: Dataset
    numbers: Sequence[int]

    def without(self, places: Collection[int]) -> Part:
        """The other rows."""
        if not places:
            return self
        gone = set(places)
        kept = [place for place in range(len(self.rows)) if place not in gone]
        return Part(self.rows.select(kept), [self.numbers[place] for place in kept])

    def shown(self, places: Sequence[int]) -> str:
        """Rows by their numbers, as a line names them."""
        first = ", ".join(str(self.numbers[place]) for place in places[:SHOWN])
        return f"row{'s' if len(places) > 1 else ''} {first}{' ...' if len(places) > SHOWN else ''}"


def lengths(texts: Sequence[Any], folder: Path | None, limit: int | None) -> Lengths | None:
    """How long texts are, in tokens where a backbone's fast tokenizer lies in its folder, else in words.

    Args:
        texts: a column; of a long one an even sample is counted.
        folder: the backbone's, where there is one.
        limit: tokens that the model takes.

    Returns:
        None where there is no text.
    """
    plain = [text if isinstance(text, str) else " ".join(text) for text in _sampled(texts) if _is_text(text)]
    if not plain:
        return None
    file = folder / "tokenizer.json" if folder is not None else None
    counts, unit = [len(text.split()) for text in plain], "words"
    if file is not None and file.is_file():
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception:  # tokenizers raises bare exceptions for what it cannot read; loading the backbone will tell
            tokenizer = None
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
            counts, unit = [len(found.ids) for found in tokenizer.encode_batch(plain)], "tokens"
    ordered = sorted(counts)
    over = sum(count > limit for count in counts) / len(counts) if limit and unit == "tokens" else None
    high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]
    return Lengths(unit, int(statistics.median(ordered)), high, ordered[-1], over, len(plain))


def _sampled(values: Sequence[Any]) -> list[Any]:
    step = max(1, len(values) // SAMPLE)
    return list(values[::step])


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    )


def empty(values: Sequence[Any]) -> list[int]:
    """The rows whose text is missing or has nothing in it."""
    return [n for n, value in enumerate(values) if value is None or (isinstance(value, str) and not value.strip())]


def label_names(rows: Dataset, column: str, *, many: bool) -> list[list[str]]:
    """The label names of each row; none where the cell is missing or of another form."""
    found = []
    for number, cell in enumerate(rows[column][:]):
        value = named(rows, cell, column)
        try:
            if isinstance(value, list) or many:
                found.append(names_in(value, number, (), many=True, check=False))
            else:
                found.append(names_in(value, number, (), many=False, check=False))
        except DataError:
            found.append([])
    return found


def counted(names: Sequence[Sequence[str]]) -> Counter[str]:
    """How many rows have each label."""
    return Counter(name for row in names for name in dict.fromkeys(row))


def balance(counts: Mapping[str, int]) -> str:
    """Labels and their numbers, the commonest first."""
    listed = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    shown = ", ".join(f"{name} {count}" for name, count in listed[:8])
    return f"{len(listed)} labels: {shown}" + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")


def repeated(rows: Dataset, columns: Sequence[str], label: str | None) -> tuple[list[int], list[int]]:
    """The rows whose input stood before: all of them, and those of them with another answer than the first had.

    Args:
        rows: one part.
        columns: what makes an input.
        label: the column of answers; None for none.
    """
    keys = list(zip(*(identities(rows, column) for column in columns), strict=True))
    answers = identities(rows, label) if label is not None else [None] * len(rows)
    first: dict[Any, Any] = {}
    again, other = [], []
    for number, (key, answer) in enumerate(zip(keys, answers, strict=True)):
        if key in first:
            again.append(number)
            if answer != first[key]:
                other.append(number)
        else:
            first[key] = answer
    return again, other


def unusable(part: Part, probe: Callable[[Dataset], Any]) -> list[Bad]:
    """Every row that a check refuses, found by halving: what takes rows one after the other tells its first fault only.

    Args:
        part: the rows.
        probe: raises an error of ours for rows that cannot be; its message says "row 3" where it is a row's fault.

    Returns:
        Faults of one kind together.
    """
    found: list[tuple[int | None, str]] = []
    full = _halve(part, probe, 0, len(part.rows), found)
    kinds: dict[str, list[tuple[int, str]]] = {}
    whole = dict.fromkeys(text for number, text in found if number is None)
    for number, text in found:
        if number is None:
            continue
        kinds.setdefault(text.split(" (")[0], []).append((number, text))
    made = [Bad(text) for text in whole]
    for group in kinds.values():
        places = tuple(place for place, _ in group)
        made.append(Bad(group[0][1], places, part.shown(places[1:]), more=full))
    return made


def _halve(
    part: Part, probe: Callable[[Dataset], Any], start: int, stop: int, found: list[tuple[int | None, str]]
) -> bool:
    """Collect the faults of rows start to stop; True where it gave up looking because there are so many."""
    if len(found) >= MOST:
        return True
    try:
        probe(part.rows.select(range(start, stop)))
    except AdaptersError as fault:
        text = str(fault)
        if not ROW.search(text):
            found.append((None, text))
        elif stop - start == 1:
            found.append((start, ROW.sub(f"row {part.numbers[start]}", text)))
        else:
            middle = (start + stop) // 2
            before = len(found)
            full = _halve(part, probe, start, middle, found)
            full = _halve(part, probe, middle, stop, found) or full
            if len(found) == before and not full:  # neither half alone is at fault: rows that do not go together
                number = ROW.search(text)
                found.append(
                    (
                        None,
                        text
                        if start == 0 or number is None
                        else f"rows {part.numbers[start]} to {part.numbers[stop - 1]}: {text}",
                    )
                )
            return full
    return False
