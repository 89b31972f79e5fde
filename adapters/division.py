"""Rows divided: into train, validation and test, or down to a number; seeded, each class in proportion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, RequestError, message
from adapters.identity import identities

if TYPE_CHECKING:
    from datasets import Dataset


def split(
    rows: Dataset,
    parts: Mapping[str, float],
    *,
    seed: int,
    by: str | None = None,
    text: str | None = None,
) -> tuple[dict[str, Dataset], list[str]]:
    """Divide rows at random, each class in proportion, no text in two parts.

    Every part gets its share of all rows (rows of one text count once), and of each class that share rounded down or
    up; one row of each class at least stays in train.

    Args:
        rows: what is divided; the rest after all parts is "train".
        parts: part name -> share of all rows, e.g. {"validation": 0.1, "test": 0.1}.
        seed: of the shuffle.
        by: the column whose values are kept in proportion; None divides without regard to any.
        text: the column whose equal values (texts, pictures) stay together.

    Returns:
        The parts, and remarks to be said: which classes are missing in which part.

    Raises:
        RequestError: shares that cannot be.
        DataError: so few rows that a part would be empty.
    """
    import numpy as np

    total = len(rows)
    if not 0 < sum(parts.values()) < 1 or min(parts.values()) <= 0:
        raise RequestError(
            message("wrong shares", where="split", expected="shares > 0, below 1 in sum", found=dict(parts))
        )
    generator = np.random.default_rng(seed)
    strata = [json.dumps(value, default=str) for value in rows[by][:]] if by else [""] * total
    together: dict[Any, list[int]] = {}
    for index, key in enumerate(identities(rows, text) if text else range(total)):
        together.setdefault(key, []).append(index)
    groups: dict[str, list[list[int]]] = {}
    for members in together.values():
        groups.setdefault(strata[members[0]], []).append(members)
    shuffled = {name: [groups[name][i] for i in generator.permutation(len(groups[name]))] for name in sorted(groups)}
    ties = dict(zip(shuffled, generator.permutation(len(shuffled)).tolist(), strict=True))
    chosen: dict[str, list[int]] = {}
    for part, count in _counts({name: len(group) for name, group in shuffled.items()}, parts, ties).items():
        chosen[part] = [row for name, group in shuffled.items() for bundle in group[: count[name]] for row in bundle]
        shuffled = {name: group[count[name] :] for name, group in shuffled.items()}
    chosen["train"] = [row for group in shuffled.values() for bundle in group for row in bundle]
    for name, members in chosen.items():
        if not members:
            raise DataError(
                message(
                    f"too few rows to divide: the part {name!r} would be empty", where="split", found=f"{total} rows"
                )
            )
    remarks = _missing({name: {strata[row] for row in members} for name, members in chosen.items()}) if by else []
    return {name: rows.select(sorted(members)) for name, members in chosen.items()}, remarks


def _counts(sizes: Mapping[str, int], parts: Mapping[str, float], ties: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """How many of each class every part gets: the largest remainders are rounded up (Hamilton's method).

    Args:
        sizes: class -> how many there are.
        parts: part name -> share.
        ties: class -> its place among equal remainders.
    """
    room = {name: size - 1 for name, size in sizes.items()}  # the last one stays in train
    # Where small classes leave too little for all parts, each is short in the same proportion.
    scale = min(1.0, sum(room.values()) / (sum(parts.values()) * sum(sizes.values())))
    owed = dict.fromkeys(sizes, 0.0)  # a class that one part rounded down comes first in the next
    result = {}
    for part, share in parts.items():
        exact = {name: scale * share * size for name, size in sizes.items()}
        count = {name: min(room[name], int(exact[name] + 1e-9)) for name in sizes}
        rest = {name: exact[name] - count[name] for name in sizes}
        left = round(scale * share * sum(sizes.values())) - sum(count.values())
        owed = {name: owed[name] + rest[name] for name in sizes}
        for name in sorted(sizes, key=lambda name: (-round(owed[name], 9), ties[name])):
            if left > 0 and rest[name] > 1e-9 and count[name] < room[name]:
                count[name] += 1
                owed[name] -= 1
                left -= 1
        room = {name: room[name] - count[name] for name in sizes}
        result[part] = count
    return result


def _missing(found: Mapping[str, set[str]]) -> list[str]:
    """One remark on the classes that some part has no row of."""
    classes = set().union(*found.values())
    lacking = {part: sorted(classes - present) for part, present in found.items() if classes - present}
    if not lacking:
        return []
    small = set().union(*map(set, lacking.values()))
    shown = "; ".join(
        f"{part} lacks {len(names)} ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''})"
        for part, names in lacking.items()
    )
    return [f"{len(small)} of {len(classes)} classes are too small to stand in every part: {shown}"]


def shared(splits: Mapping[str, Dataset], columns: Sequence[str]) -> list[str]:
    """Remarks on inputs that stand in two parts that were given, with their number and the first of them.

    Nothing is taken out: which rows are measured is the user's to say.

    Args:
        splits: part name -> rows, train first.
        columns: what makes an input, e.g. text, or text and text_pair.
    """
    first: dict[Any, tuple[str, int]] = {}
    remarks = []
    for part, rows in splits.items():
        twice: dict[str, list[tuple[int, int]]] = {}
        own = list(zip(*(identities(rows, column) for column in columns), strict=True))
        for row, key in enumerate(own):
            if key in first:
                other, place = first[key]
                twice.setdefault(other, []).append((row, place))
        for row, key in enumerate(own):
            first.setdefault(key, (part, row))
        for other, found in twice.items():
            row, place = found[0]
            remarks.append(
                f"{len(found)} of {len(rows)} {part} rows stand in {other} too (first: {part} row {row}, {other} row "
                f"{place}): numbers over {part} are better than over new rows"
            )
    return remarks


def sample(rows: Dataset, count: int, *, seed: int, by: str | None = None) -> Dataset:
    """Some of the rows at random, in their order, each class in proportion and with one row at least.

    Args:
        rows: what is drawn from.
        count: how many rows.
        seed: of the draw.
        by: the column whose values are kept in proportion.
    """
    import numpy as np

    if count >= len(rows):
        return rows
    order = np.random.default_rng(seed).permutation(len(rows))
    if by is None:
        return rows.select(sorted(order[:count].tolist()))
    keys = [json.dumps(value, default=str) for value in rows[by][:]]
    # Rank of each row in its class as a share of the class: the lowest shares are a proportional draw, and each
    # class's first row comes before any second one.
    sizes, seen, ranks = Counter(keys), Counter[str](), {}
    for index in order.tolist():
        rank = seen[keys[index]]
        seen[keys[index]] += 1
        ranks[index] = (rank > 0, (rank + 0.5) / sizes[keys[index]])
    return rows.select(sorted(sorted(ranks, key=lambda index: ranks[index])[:count]))
