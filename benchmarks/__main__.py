"""Speed from the frozen backbone: every row of the table, ours and the peer's in turn, in one run.

    python -m benchmarks                     small sizes, under 20 minutes on two cores; starts anew
    python -m benchmarks --full              the sizes that the documentation quotes; goes on where it was stopped
    python -m benchmarks --only probe,merge  these rows alone
    python -m benchmarks --table             the table of what is kept; runs nothing

Each run is a process of its own; ours and the peer's take turns, and medians stand beside smallest and largest. Rows
come from ../shared/data and the backbone is the quickstart's; where either is absent it is made here, and that is said.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from benchmarks import harness, kept
from benchmarks.harness import CACHE, ChildError, OutOfTime, positive, say, spread
from benchmarks.kept import Measured, Run
from benchmarks.lines import Line, markdown
from benchmarks.rows import MODES, OURS, Row, Task, wanted
from benchmarks.rows_files import FILES
from benchmarks.rows_frozen import FROZEN
from benchmarks.rows_lora import LORA
from benchmarks.texts import stand_ins

ROWS: Mapping[str, Row] = {
    **{name: FROZEN[name] for name in ("probe", "freeze", "freeze12")},
    "lora": LORA["lora"],
    "upper": FROZEN["upper"],
    **{name: LORA[name] for name in ("steps", "floor")},
    "vocabulary": FILES["vocabulary"],
    **{name: FROZEN[name] for name in ("probes", "settings")},
    "merge": FILES["merge"],
    "again": FROZEN["again"],
    "startup": FILES["startup"],
}
SECONDS = 19 * 60  # of a quick run; what is not done by then is left out, which is said
LAST = "lora"
LOOKED = 1.0  # seconds for which the machine's other work is watched


# ---------------------------------------------------------------------- the machine


def free_threads() -> int:
    """Threads for torch: the cores that nothing else keeps busy now, at least one.

    Two threads that wait for each other beside another program can take ten times as long as one.
    """
    cores = os.cpu_count() or 1
    before = harness.busy_seconds()
    time.sleep(LOOKED)
    after = harness.busy_seconds()
    if before is None or after is None:
        return cores
    busy = (after - before) / LOOKED
    threads = max(1, cores - round(busy))
    if threads < cores:
        say(f"other work keeps {busy:.1f} of {cores} cores busy: {threads} thread(s) for torch; or say --threads")
    return threads


# ---------------------------------------------------------------------- runs


def planned(name: str, mode: str, threads: int, results: Sequence[Measured]) -> list[Run]:
    """A row's runs, as far as they are known by now."""
    row, versions = ROWS[name], kept.installed()
    ours, peer = kept.code("adapters", *row.sources), kept.code(*row.sources)
    stand_in = bool(stand_ins(row.sets)) if row.sets else False

    def run(case: str, side: str, seed: int) -> Run:
        code = ours if side.startswith((OURS, "adapters")) else peer
        return Run(name, case, side, seed, row.sizes[mode][case], threads, stand_in, code, versions)

    found = []
    for case in row.sizes[mode]:
        pattern = run(case, "", 0)
        mine = [
            result
            for result in results
            if (result.run.row, result.run.case) == (name, case)
            and replace(result.run, side="", seed=0, code="") == replace(pattern, code="")
            and result.run.code in (ours, peer)
        ]
        found += [run(case, side, seed) for side, seed in wanted(name, row, mode, case, mine)]
    return found


def missing(name: str, mode: str, threads: int, file: Path, failed: Sequence[Run]) -> Run | None:
    """The first of a row's runs that the file does not hold, those that failed left out."""
    results = kept.known(file)
    done = [*(result.run for result in results), *failed]
    return next((run for run in planned(name, mode, threads, results) if run not in done), None)


def carry_out(names: Sequence[str], mode: str, threads: int, file: Path, until: float | None) -> list[str]:
    """Run what the file does not hold yet, row by row; what could not be measured, a sentence each."""
    faults: list[str] = []
    failed: list[Run] = []
    for name in names:
        began = time.monotonic()
        while (run := missing(name, mode, threads, file, failed)) is not None:
            left = None if until is None else until - time.monotonic()
            say(f"[{name}] {run} ...")
            try:
                if left is not None and left < 1:
                    raise OutOfTime("the time was up")
                result = measured(run, left)
            except ChildError as fault:
                faults.append(f"{run}: not measured, {str(fault).splitlines()[-1]}")
                say(f"    not measured: {fault}")
                failed.append(run)
                continue
            kept.keep(result, file)
            shown = "" if result.accuracy is None else f", accuracy {100 * result.accuracy:.1f} %"
            say(f"    {result.seconds:.2f} s{shown}; {result.whole_seconds:.0f} s in all")
        say(f"[{name}] {time.monotonic() - began:.0f} s")
    return faults


def measured(run: Run, limit: float | None) -> Measured:
    """One run, in processes that see an empty cache of the user's."""
    began, used = time.monotonic(), harness.children_seconds()
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        folder = Path(scratch)
        environment = {
            "XDG_CACHE_HOME": str(folder / "cache"),
            "OMP_NUM_THREADS": str(run.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }
        (folder / "run").mkdir()
        found = ROWS[run.row].measure(Task(run, limit, folder / "run", environment))
    return Measured(
        run=run,
        **found,
        whole_seconds=round(time.monotonic() - began, 1),
        whole_cpu_seconds=round(harness.children_seconds() - used, 1),
    )


# ---------------------------------------------------------------------- the table


def lines(results: Sequence[Measured], names: Sequence[str]) -> Iterator[Line]:
    """The lines of these rows, as far as they are measured."""
    for name in names:
        mine = kept.newest(results, name)
        for case in dict.fromkeys(result.run.case for result in mine):
            here = [result for result in mine if result.run.case == case]
            by_side = _Sides({side: [r for r in here if r.run.side == side] for side in {r.run.side for r in here}})
            repeats = max(map(len, by_side.values()))
            for line in ROWS[name].lines(case, here[-1].run.size, by_side):
                counted = f"{repeats} time{'s' if repeats > 1 else ''}"
                yield replace(line, size=", ".join(part for part in (line.size, counted) if part))


class _Sides(dict[str, list[Measured]]):
    """Results by side; a side that has none is empty."""

    def __missing__(self, side: str) -> list[Measured]:
        return []


def report(results: Sequence[Measured], names: Sequence[str], mode: str, faults: Sequence[str] = ()) -> str:
    """The table, what it stands on, and what is not in it."""
    mine = [result for name in names for result in kept.newest(results, name)]
    if not mine:
        return "\n".join(["nothing measured yet", *faults])
    said = {
        "smoke": "Sizes that only try the command: no number here says anything.",
        "quick": "Small sizes (--quick); --full measures those that the documentation quotes.",
        "full": "Full sizes.",
    }[mode]
    text = [markdown(list(lines(results, names))), said]
    text.append(
        "Times are medians (smallest to largest) over seeds or rounds, ours and the peer's in turn. A training's time "
        "runs from raw rows to the end of train(), with all that it caches and solves; accuracy is over the test rows."
    )
    if any(result.run.made for result in mine):
        text += stand_ins([name for row in names for name in ROWS[row].sets]) or ["Some rows were made here."]
    others = [result.others_cores for result in mine if result.others_cores is not None]
    if others:
        text.append(f"Other work kept {spread(others, 1)} cores busy.")
    machines = dict.fromkeys(result.machine for result in mine if result.machine)
    text.append(f"{' and also '.join(machines)}. {' and also '.join(dict.fromkeys(r.run.installed for r in mine))}.")
    took = []
    for name in names:
        here = [result for result in mine if result.run.row == name]
        spent, used = sum(r.whole_seconds for r in here), sum(r.whole_cpu_seconds for r in here)
        took += [f"{name} {spent:.0f} ({used:.0f})"] if here else []
    text.append(f"Seconds of each row, in all (of processor time): {', '.join(took)}.")
    return "\n\n".join([*text, *filter(None, ["\n".join(f"- {fault}" for fault in faults)])])


# ---------------------------------------------------------------------- the command


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    about = "\n".join([__doc__ or "", "rows:", *(f"    {name:<11} {row.what}" for name, row in ROWS.items())])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    for mode, words in zip(MODES, (argparse.SUPPRESS, "small sizes (the default)", "the sizes to quote"), strict=True):
        chosen.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=words)
    parser.set_defaults(mode="quick")
    parser.add_argument("--only", type=harness.row_names(tuple(ROWS)), metavar="ROW[,ROW]", help="these rows alone")
    parser.add_argument("--table", action="store_true", help="print the table of what is kept; run nothing")
    parser.add_argument("--results", type=Path, help="results file (benchmarks/.cache/table-MODE.jsonl)")
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="of torch (quick: the cores that nothing else uses; full: all)"
    )
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Measure, then print the table; 1 where a run failed."""
    asked = arguments(given)
    names = [name for name in ROWS if name in (asked.only or ROWS)]
    file: Path = asked.results or CACHE / f"table-{asked.mode}.jsonl"
    faults: list[str] = []
    if not asked.table:
        began = time.monotonic()
        if find_spec("torch") is None:
            raise SystemExit("torch is not installed. Install the project first: see README.md.")
        for line in stand_ins([name for row in names for name in ROWS[row].sets]):
            say(line)
        # A full run goes on days later, under the same terms whatever else runs by then.
        threads = asked.threads or ((os.cpu_count() or 1) if asked.mode == "full" else free_threads())
        if asked.mode != "full":
            kept.drop(names, file)
        until = None if asked.mode == "full" else began + SECONDS
        # The dearest last: what a quick run has no time for is one row, and not many.
        faults = carry_out(sorted(names, key=lambda name: name == LAST), asked.mode, threads, file, until)
        say(f"{time.monotonic() - began:.0f} s in all; kept in {file}")
    print(report(kept.known(file), names, asked.mode, faults))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
