"""A row of the table: what is measured at which size, who measures it, and how its lines are read off the results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.kept import Measured, Run
from benchmarks.lines import Line

OURS, PEER, TUNED = "ours", "peer", "peer, grouped by length and bf16"
MODES = ("smoke", "quick", "full")  # smoke: tries the command, and measures nothing worth reading


@dataclass(frozen=True)
class Task:
    """What a run is asked with.

    Attributes:
        run: the run.
        limit: seconds that it may take; None for any number.
        folder: an empty folder that lives as long as the run.
        environment: variables of its processes.
    """

    run: Run
    limit: float | None
    folder: Path
    environment: Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        what: in a line of words.
        sizes: mode -> case -> what a run's size is.
        sides: mode -> who runs, in this order, seed by seed.
        seeds: mode -> seeds, or rounds where nothing is random.
        measure: a run to what it came to, as `Measured` has it.
        lines: the newest results, by side, of one case, to lines of the table.
        sources: of our side's code and of the peer's, below the checkout.
        sets: of rows that it takes from beside the checkout.
        plan: instead of "every side at every seed", for a row whose runs depend on results.
    """

    what: str
    sizes: Mapping[str, Mapping[str, Mapping[str, Any]]]
    sides: Mapping[str, Sequence[str]]
    seeds: Mapping[str, int]
    measure: Callable[[Task], Mapping[str, Any]]
    lines: Callable[[str, Mapping[str, Any], Mapping[str, list[Measured]]], Iterable[Line]]
    sources: Sequence[str]
    sets: Sequence[str] = ()
    plan: Callable[[str, str, Sequence[Measured]], list[tuple[str, int]]] | None = None


def same(value: Any) -> dict[str, Any]:
    """The same in every mode."""
    return dict.fromkeys(MODES, value)


def everyone(quick: Sequence[str], full: Sequence[str] | None = None) -> dict[str, Sequence[str]]:
    """Who runs: in a full run maybe more."""
    return {"smoke": quick, "quick": quick, "full": full or quick}


def repeats(quick: int, full: int) -> dict[str, int]:
    """Seeds or rounds."""
    return {"smoke": 1, "quick": quick, "full": full}


def wanted(name: str, row: Row, mode: str, case: str, results: Sequence[Measured]) -> list[tuple[str, int]]:
    """Side and seed of each run of a case, ours and the peer's in turn."""
    if row.plan is not None:
        return row.plan(mode, case, results)
    return [(side, seed) for seed in range(row.seeds[mode]) for side in row.sides[mode]]
