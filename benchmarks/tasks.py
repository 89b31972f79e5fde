"""Every task on real rows, beside the untrained model, the best blind answer, and peft under transformers.Trainer.

Both sides get the same backbone, rank, modules and training arguments; the peer its own head, collator and defaults.
Every run is a process of its own; ours and the peer's take turns. The rows come from ../shared/data; where it is absent
only the embedded support set is measured, in the place of sst2, and that is said.

    python -m benchmarks.tasks                     a small run of every row
    python -m benchmarks.tasks --full              larger, three seeds; goes on where it was stopped
    python -m benchmarks.tasks --only sst2,wnut17  these rows alone
    python -m benchmarks.tasks --table             the table of what was measured so far
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

from benchmarks import harness
from benchmarks.harness import CACHE, ChildError, positive, rate, say, spread
from benchmarks.tasks_rows import EMBEDDED, LLAMA, OURS, PEER, ROWS, SHARED, SIDES, VIT, Result, Run, Score

CHILD = "benchmarks.tasks_child"
SEEDS = {"quick": 1, "full": 3}


# ---------------------------------------------------------------------- the plan


def source(name: str) -> str | None:
    """Where a row's data comes from; None, said aloud, where it cannot be measured here."""
    row = ROWS[name]
    data = row.data if (SHARED / "data" / row.data).exists() else EMBEDDED if name == "sst2" else None
    lacking = [
        folder for folder in (VIT, LLAMA) if row.backbone == folder and not (SHARED / "models" / folder).is_dir()
    ]
    lacking += [
        package
        for task, package in (("seq2seq", "sacrebleu"), ("token-classification", "seqeval"))
        if row.task == task and find_spec(package) is None
    ]
    if data is None:
        lacking.append(str(SHARED / "data" / row.data))
    if lacking:
        say(f"{name} is left out: there is no {' and no '.join(lacking)}")
        return None
    if data == EMBEDDED:
        say(f"{name} is not beside the checkout: {EMBEDDED} takes its place")
    return data


def plan(names: Sequence[str], mode: str, seeds: int) -> list[Run]:
    """The runs in their order: ours and the peer's take turns."""
    runs = []
    for name in names:
        row, data = ROWS[name], source(name)
        if data is not None:
            size = row.quick if mode == "quick" else row.full
            runs += [
                Run(name, side, seed, size, row.learning_rate, row.batch_size, row.strategy, data)
                for seed in range(seeds)
                for side in SIDES
            ]
    return runs


def carry_out(runs: Sequence[Run], file: Path) -> None:
    """Run what the results file does not hold yet; each result is on disk before the next run starts."""
    for number, run in enumerate(runs, 1):
        place = f"[{number}/{len(runs)}] {run}"
        if any(result.run == run for result in harness.read(file, Result.parse)):
            say(f"{place}: measured before")
            continue
        say(f"{place} ...")
        result = Result.parse(harness.in_child(CHILD, {"run": asdict(run)}))
        harness.append(asdict(result), file)
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in result.trained.items())
        say(f"    {numbers}, {result.train_seconds:.0f} s of training")


# ---------------------------------------------------------------------- the table


def newest(name: str, side: str, results: Sequence[Result]) -> list[Result]:
    """A side's results over seeds, with the settings of the newest."""
    mine = [result for result in results if result.run.row == name and result.run.side == side]
    return [result for result in mine if replace(result.run, seed=mine[-1].run.seed) == mine[-1].run]


def table(results: Sequence[Result]) -> str:
    """What every row came to, its settings, and the machine, in Markdown."""
    names = [name for name in ROWS if newest(name, OURS, results) or newest(name, PEER, results)]
    heads = ("row", "measure", "blind", "untrained", "ours", "peer", "ours minus peer", "training, s: ours", "peer")
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for name in names:
        lines += ["| " + " | ".join(cells) + " |" for cells in numbers(name, results)]
    lines += ["", "| row | task, strategy | backbone | training, test rows | epochs | learning rate | batch | seeds |"]
    lines += ["|---|---|---|---:|---:|---:|---:|---:|"]
    lines += ["| " + " | ".join(given(name, results)) + " |" for name in names]
    lines += ["", *(f"- {name}: {ROWS[name].same}" for name in names), "", circumstances(results)]
    return "\n".join(lines)


def numbers(name: str, results: Sequence[Result]) -> Iterator[list[str]]:
    """The cells of a row, a line for each of its numbers."""
    mine, others = newest(name, OURS, results), newest(name, PEER, results)
    for entry in ROWS[name].scores:
        ours, peer = values(entry, [r.trained for r in mine]), values(entry, [r.trained for r in others])
        yield [
            name,
            entry.title + ("" if entry.higher else " (lower is better)"),
            spread(values(entry, [r.floor for r in mine]), entry.digits),
            spread(values(entry, [r.untrained for r in mine]), entry.digits),
            spread(ours, entry.digits),
            spread(peer, entry.digits),
            f"{mean(ours) - mean(peer):+.{entry.digits}f}" if ours and peer else "-",
            spread([r.train_seconds for r in mine], 0),
            spread([r.train_seconds for r in others], 0),
        ]


def values(entry: Score, found: Sequence[dict[str, float]]) -> list[float]:
    """A number over seeds, as it is shown."""
    return [entry.factor * each[entry.key] for each in found if entry.key in each]


def given(name: str, results: Sequence[Result]) -> list[str]:
    """What both sides got."""
    row, member = ROWS[name], (newest(name, OURS, results) or newest(name, PEER, results))[0]
    run = member.run
    return [
        name if run.data != EMBEDDED else f"{name} ({EMBEDDED})",
        f"{row.task}, {run.strategy}",
        row.backbone,
        f"{member.rows.train:,}, {member.rows.test:,}",
        str(run.size.epochs),
        rate(run.learning_rate),
        str(run.batch_size),
        str(len({r.run.seed for side in SIDES for r in newest(name, side, results)})),
    ]


def circumstances(results: Sequence[Result]) -> str:
    """Machine, versions and company; more than one machine or set of versions is there to be seen."""
    machines, versions = ({r.machine: 0 for r in results}, {r.versions: 0 for r in results})
    others = [r.others_cores for r in results if r.others_cores is not None]
    busy = f" Other work kept {spread(others, 1)} cores busy." if others else ""
    return f"{' and also '.join(machines)}. {' and also '.join(versions)}.{busy}"


# ---------------------------------------------------------------------- the command


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a small run (the default)")
    size.add_argument("--full", dest="mode", action="store_const", const="full", help="larger, three seeds")
    parser.set_defaults(mode="quick")
    parser.add_argument("--table", action="store_true", help="print what the results file holds; run nothing")
    parser.add_argument("--results", type=Path, help="results file (benchmarks/.cache/tasks-MODE.jsonl)")
    parser.add_argument("--seeds", type=positive, metavar="N", help="1, with --full 3")
    known = tuple(ROWS)
    parser.add_argument("--only", type=harness.row_names(known), metavar="ROW[,ROW]", help=f"of {', '.join(known)}")
    return parser.parse_args()


def main() -> None:
    """Measure, then print the table."""
    asked = arguments()
    file: Path = asked.results or CACHE / f"tasks-{asked.mode}.jsonl"
    if not asked.table:
        try:
            carry_out(plan(asked.only or list(ROWS), asked.mode, asked.seeds or SEEDS[asked.mode]), file)
        except ChildError as fault:
            raise SystemExit(f"{fault}\nWhat was measured before is kept: {file}") from fault
    results = harness.read(file, Result.parse)
    print(table(results) if results else f"nothing measured yet ({file})")


if __name__ == "__main__":
    main()
