"""What faults do to a run and to what it wrote: ours beside peft under transformers.Trainer.

Six parts. kills: SIGKILL at random moments of a run that saves after every step, then a resume. ranks: the same of
one process of two or three. states: every file of a checkpoint lost, empty, half-written or old, then a resume.
writes: each change of the disk in a save fails in turn. flips: single bits of an adapter folder turned over. folders:
adapter folders made to do harm. Everything is made here; models are tiny, each run is a forked child. "Bit for bit"
compares the trained weights and every logged loss, gradient norm and learning rate with those of a run that nothing
happened to.

    python -m benchmarks.faults                      everything; goes on where it was stopped
    python -m benchmarks.faults --quick              a few faults of each kind
    python -m benchmarks.faults --only kills,flips   these parts alone
    python -m benchmarks.faults --table              the tables of what was measured so far

Ends with status 1 where ours lost, hid or let pass anything.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.faults_outcomes import OUTCOMES
from benchmarks.harness import CACHE, ROOT, say

PARTS = ("kills", "ranks", "states", "writes", "flips", "folders")
TITLES = {"ours": "ours", "plain": "peft + transformers"}


@dataclass(frozen=True)
class Size:
    """How many faults of each part, for ours and for the plain stack; None for every one there is."""

    kills: tuple[int, int]
    ranks: tuple[int, int]
    states: tuple[int | None, int | None]
    writes: tuple[int | None, int | None]
    flips: tuple[int, int]
    folders: tuple[int | None, int | None]


SIZES = {
    "full": Size((200, 60), (40, 20), (None, None), (None, None), (10_000, 10_000), (None, None)),
    "quick": Size((4, 2), (2, 1), (8, 3), (10, 4), (250, 100), (20, 10)),
}


@dataclass(frozen=True)
class Result:
    """What one fault, or a batch of flips, came to."""

    part: str
    side: str
    case: str
    group: str
    faults: int
    counts: dict[str, int]
    words: dict[str, str]
    machine: str
    versions: str

    @classmethod
    def parse(cls, line: dict[str, Any]) -> Result:
        """From a line of the results file."""
        return cls(**line)

    def wrong(self) -> list[str]:
        """Outcomes that ours must not have."""
        return [came for came in self.counts if not OUTCOMES[came]] if self.side == "ours" else []


# ---------------------------------------------------------------------- the plan


def possible(parts: Sequence[str]) -> list[str]:
    """The parts that can be measured here; what cannot is said."""
    from benchmarks.faults_trace import POSSIBLE

    elsewhere = "system calls are watched on Linux, x86-64, alone"
    lacking = {} if POSSIBLE else dict.fromkeys(("writes", "folders"), elsewhere)
    if not (ROOT / "tests" / "hostile.py").is_file():
        lacking["folders"] = "there is no tests/hostile.py"
    for part in parts:
        if part in lacking:
            say(f"{part} is left out: {lacking[part]}")
    return [part for part in parts if part not in lacking]


def carry_out(parts: Sequence[str], sides: Sequence[str], size: Size, file: Path, place: Path) -> None:
    """Do what the results file does not hold yet; each result is on disk before the next fault."""
    from benchmarks import faults_folders, faults_ranks, faults_runs, faults_writes
    from benchmarks.faults_sides import SIDES, train

    makers: dict[str, Callable[..., Iterator[Any]]] = {
        "kills": faults_runs.kills,
        "ranks": faults_ranks.ranks,
        "states": faults_runs.states,
        "writes": faults_writes.writes,
        "flips": faults_folders.flips,
        "folders": faults_folders.folders,
    }
    for name, side in SIDES.items():  # what is imported here need not be imported in every child
        train(side, place / f"first-{name}", False, max_steps=1, save_steps=1, warmup_steps=0)
    machine, versions = harness.machine("cpu"), harness.versions()
    gc.freeze()  # what is here now no child has to look through
    for part in parts:
        for name, count in zip(SIDES, getattr(size, part), strict=True):
            if name not in sides:
                continue
            known = {(r.part, r.side, r.case) for r in harness.read(file, Result.parse)}
            room = place / f"{part}-{name}"
            room.mkdir()
            say(f"{part}, {TITLES[name]}")
            for case in makers[part](name, count, room):
                if (part, name, case.name) in known:
                    continue
                found = case.act()
                result = Result(part, name, case.name, machine=machine, versions=versions, **vars(found))
                harness.append(asdict(result), file)
                for came in result.wrong():
                    say(f"    {case.name}: {came} ({found.words[came]})")


# ---------------------------------------------------------------------- the tables


def tables(results: Sequence[Result]) -> Iterator[str]:
    """One table a part, in Markdown."""
    for part in PARTS:
        mine = [result for result in results if result.part == part]
        if mine:
            yield f"### {part}\n\n" + "\n".join(table(mine))
    machines, versions = ({r.machine: 0 for r in results}, {r.versions: 0 for r in results})
    yield f"{' and also '.join(machines)}. {' and also '.join(versions)}."


def table(results: Sequence[Result]) -> Iterator[str]:
    """The rows of a part: a group and a side; the columns are what came of its faults."""
    columns = [came for came in OUTCOMES if any(came in result.counts for result in results)]
    yield f"| | side | faults | {' | '.join(columns)} |"
    yield "|---|---|---:|" + "---:|" * len(columns)
    for group in dict.fromkeys(result.group for result in results):
        for side, title in TITLES.items():
            mine = [result for result in results if (result.group, result.side) == (group, side)]
            if mine:
                cells = [f"{sum(result.counts.get(came, 0) for result in mine):,}" for came in columns]
                yield f"| {group} | {title} | {sum(result.faults for result in mine):,} | {' | '.join(cells)} |"


# ---------------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a few of each")
    parser.set_defaults(mode="full")
    parser.add_argument("--only", type=harness.row_names(PARTS), metavar="PART[,PART]", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--side", choices=tuple(TITLES), help="this side alone")
    parser.add_argument("--table", action="store_true", help="print what the results file holds; do nothing")
    parser.add_argument("--results", type=Path, help="results file (benchmarks/.cache/faults-MODE.jsonl)")
    parser.add_argument("--folder", type=Path, help="where runs are written (a temporary folder)")
    return parser.parse_args()


def main() -> None:
    """Measure, then print the tables."""
    asked = arguments()
    file: Path = asked.results or CACHE / f"faults-{asked.mode}.jsonl"
    if not asked.table:
        with tempfile.TemporaryDirectory(prefix="faults-", dir=asked.folder) as place:
            sides = [asked.side] if asked.side else list(TITLES)
            carry_out(possible(asked.only or PARTS), sides, SIZES[asked.mode], file, Path(os.path.realpath(place)))
    results = harness.read(file, Result.parse)
    print("\n\n".join(tables(results)) if results else f"nothing measured yet ({file})")
    wrong = sum(bool(result.wrong()) for result in results)
    if wrong:
        raise SystemExit(f"{wrong} results of ours are not what they should be")


if __name__ == "__main__":
    main()
