"""What can come of a fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

SCRATCH, SAME = "from scratch, bit for bit", "resumed, bit for bit"
SAID, UNSAID = "from an older one, said so, bit for bit", "from an older one, nothing said"
KILLED, QUIET, CLEAR, RAW = "killed", "no error", "a clear error", "a raw error"
WHOLE, LOST = "then loads, old or new", "then cannot be loaded"
CAUGHT, NOTHING = "refused", "loads, unchanged"
STUCK, OTHER = "cannot resume", "another result, SILENT"
WARNED, SILENT = "loads otherwise, a warning", "loads otherwise, SILENT"
EXECUTED, OUTSIDE, HUNG = "executed", "read outside", "hung"
# In the order of the tables' columns -> whether ours may come to it.
OUTCOMES = {
    **dict.fromkeys((KILLED, QUIET, CLEAR), True),
    RAW: False,
    **dict.fromkeys((SCRATCH, SAME, SAID, WHOLE, CAUGHT, NOTHING), True),
    **dict.fromkeys((UNSAID, STUCK, OTHER, LOST, WARNED, SILENT, EXECUTED, OUTSIDE, HUNG), False),
}


@dataclass(frozen=True)
class Case:
    """One fault: what it is called, and the act that does it to a side and counts what came of it."""

    part: str
    side: str
    name: str
    act: Callable[[], Found]


@dataclass(frozen=True)
class Found:
    """What came of a fault, or of many at once: outcome -> number, and the first words for each outcome."""

    group: str  # the row of the table that it is counted in
    faults: int
    counts: dict[str, int]
    words: dict[str, str] = field(default_factory=dict)
