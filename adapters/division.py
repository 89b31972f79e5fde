"""Rows divided: into train, validation and test, or down to a number; seeded, each class in proportion."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adapters.errors import DataError, RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset


def split(
    rows: Dataset, parts: Mapping[str, float], *, seed: int, by: str | None = None, text: str | None = None
) -> tuple[dict[str, Dataset], list[str]]:
    """Divide rows at random, each class in proportion, no text in two parts.

    Args:
        rows: what is divided; the rest after all parts is "train".
        parts: part name -> share of all rows, e.g. {"validation": 0.1, "test": 0.1}.
        seed: of the shuffle.
        by: the column whose values are kept in proportion; None divides without regard to any.
        text: the column whose equal values stay together.

    Returns:
        The parts, and remarks to be said: classes too small to divide, which stay in train.
    """
    import numpy as np

    total = len(rows)
    if not 0 < sum(parts.values()) < 1 or min(parts.values()) <= 0:
        raise RequestError(
            message("wrong shares", where="split", expected="shares > 0, below 1 in sum", found=dict(parts))
        )
    generator = np.random.default_rng(seed)
    groups: dict[Any, list[list[int]]] = {}
    keys = rows[text] if text else range(total)
    strata = rows[by] if by else [None] * total
    together: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        together.setdefault(json.dumps(key) if isinstance(key, list) else key, []).append(index)
    for members in together.values():
        groups.setdefault(json.dumps(strata[members[0]], default=str), []).append(members)
    chosen: dict[str, list[int]] = {name: [] for name in [*parts, "train"]}
    small = []
    for stratum in sorted(groups):
        bundles = groups[stratum]
        order = generator.permutation(len(bundles))
        taken = 0
        counts = {name: round(share * len(bundles)) for name, share in parts.items()}
        if sum(counts.values()) >= len(bundles) or any(count == 0 for count in counts.values()):
            small.append(stratum)
            counts = {name: min(count, max(0, len(bundles) - 1 - i)) for i, (name, count) in enumerate(counts.items())}
            if sum(counts.values()) >= len(bundles):
                counts = dict.fromkeys(parts, 0)
        for name, count in counts.items():
            for position in order[taken : taken + count]:
                chosen[name] += bundles[position]
            taken += count
        for position in order[taken:]:
            chosen["train"] += bundles[position]
    remarks = []
    if small and by:
        shown = ", ".join(small[:5]) + (" ..." if len(small) > 5 else "")
        remarks.append(f"{len(small)} of {len(groups)} classes are too small for every part and lean to train: {shown}")
    for name, members in chosen.items():
        if not members:
            raise DataError(
                message(
                    f"too few rows to divide: the part {name!r} would be empty", where="split", found=f"{total} rows"
                )
            )
    return {name: rows.select(sorted(members)) for name, members in chosen.items()}, remarks


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
    keys = [json.dumps(value, default=str) for value in rows[by]]
    # Rank of each row in its class as a share of the class: the lowest shares are a proportional draw, and each
    # class's first row comes before any second one.
    sizes, seen, ranks = Counter(keys), Counter[str](), {}
    for index in order.tolist():
        rank = seen[keys[index]]
        seen[keys[index]] += 1
        ranks[index] = (rank > 0, (rank + 0.5) / sizes[keys[index]])
    return rows.select(sorted(sorted(ranks, key=lambda index: ranks[index])[:count]))
