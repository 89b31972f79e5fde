"""What is said of rows in several parts, put together: counts are summed, any other remark stands once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

# "3 of 1000 texts (0.3 %) are longer": what counts rows begins like this.
_COUNTED: Final = re.compile(r"(\d+) of (\d+) (\w+)( \([\d.]+ %\))?(.*)", re.DOTALL)


def merged(parts: Iterable[Sequence[str]]) -> list[str]:
    """The remarks on all rows, from those on the parts that they were looked at in.

    Args:
        parts: of each part its remarks, and before them its number of rows as text, which are added to the rows of a
            count that the part says nothing of.
    """
    counts: dict[tuple[str, str, bool], list[int]] = {}
    order: dict[object, None] = {}
    seen: dict[tuple[str, str, bool], set[int]] = {}
    rows: list[int] = []
    for number, (size, *remarks) in enumerate(parts):
        rows.append(int(size))
        for remark in remarks:
            found = _COUNTED.fullmatch(remark)
            if found is None:
                order[remark] = None
                continue
            key = (found[3], found[5], found[4] is not None)
            total = counts.setdefault(key, [0, 0])
            total[0] += int(found[1])
            total[1] += int(found[2])
            seen.setdefault(key, set()).add(number)
            order[key] = None
    said = []
    for entry in order:
        if isinstance(entry, str):
            said.append(entry)
            continue
        assert isinstance(entry, tuple)
        what, rest, share = entry
        some, of = counts[entry]
        of += sum(size for number, size in enumerate(rows) if number not in seen[entry])
        said.append(f"{some} of {of} {what}{f' ({100 * some / of:.1f} %)' if share else ''}{rest}")
    return said
