"""How good a run without a knob is, beside peft under transformers.Trainer with its learning rate searched.

Banking77 intents with MiniLM. Ours takes each strategy's own defaults; the peer gets the same rank, modules, batch
size and number of epochs, four learning rates, and the best of them by validation accuracy. Every run is a process of
its own, so that its peak memory is its own; ours and the peer's take turns, so that both see the same machine.

    python -m benchmarks.quality              a small run of every row
    python -m benchmarks.quality --full       the run that the documentation quotes; goes on where it was stopped
    python -m benchmarks.quality --table      the table of what was measured so far
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import zip_longest
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import harness
from benchmarks.harness import CACHE, ROOT, ChildError, positive, rate, say, spread
from benchmarks.quality_child import EMBEDDED, PEER, Result, Rows, Run

CHILD = "benchmarks.quality_child"
DATA = ROOT.parent / "shared" / "data" / "banking77"
OURS = ("lora", "qlora", "full", "freeze", "probe")
RATES = (1e-4, 3e-4, 1e-3, 3e-3)  # the peer's; its best is chosen by validation accuracy with seed 0


@dataclass(frozen=True)
class Mode:
    """How much is measured."""

    train_rows: int
    test_rows: int
    seeds: int  # of lora and the peer; the other rows run once


MODES = {"quick": Mode(400, 500, 1), "full": Mode(3000, 1000, 3)}


# ---------------------------------------------------------------------- the plan


def plan(rows: Sequence[str], seeds: int, survey: Mapping[str, Any], epochs_asked: int | None) -> list[Run]:
    """The runs in their order: ours and the peer's take turns."""
    shown = Rows(**survey["rows"])

    def run(row: str, seed: int, learning_rate: float | None, settings: Mapping[str, Any]) -> Run:
        epochs = epochs_asked or int(settings["epochs"])
        return Run(row, seed, learning_rate, epochs, int(settings["batch_size"]), shown, epochs_asked)

    ours, peer = [], []
    for row in (row for row in OURS if row in rows):
        settings = survey["settings"][row]
        ours += [run(row, seed, settings["learning_rate"], settings) for seed in range(seeds if row == "lora" else 1)]
    if PEER in rows:
        settings = survey["settings"]["lora"]
        peer = [run(PEER, 0, each, settings) for each in RATES]
        peer += [run(PEER, seed, None, settings) for seed in range(1, seeds)]
    return [each for pair in zip_longest(ours, peer) for each in pair if each is not None]


def searched(results: Sequence[Result]) -> dict[float, Result]:
    """The peer's learning rates and what they came to with seed 0, all else as in its newest result."""
    tried = {result.run: result for result in results if result.run.row == PEER and result.run.seed == 0}
    newest = [replace(run, learning_rate=None) for run in tried][-1:]
    return {
        run.learning_rate: result
        for run, result in tried.items()
        if run.learning_rate is not None and [replace(run, learning_rate=None)] == newest
    }


def best_rate(results: Sequence[Result]) -> float | None:
    """The peer's best learning rate by validation accuracy; None before every rate was tried."""
    tried = searched(results)
    if set(tried) != set(RATES):
        return None
    return max(tried, key=lambda each: tried[each].validation_accuracy)


def carry_out(runs: Sequence[Run], file: Path, data: Path | None) -> None:
    """Run what the results file does not hold yet; each result is on disk before the next run starts."""
    for number, planned in enumerate(runs, 1):
        known = harness.read(file, Result.parse)
        mine = [result for result in known if result.run.experiment == planned.experiment]
        run = replace(planned, learning_rate=best_rate(mine)) if planned.learning_rate is None else planned
        place = f"[{number}/{len(runs)}] {run}"
        if any(result.run == run for result in known):
            say(f"{place}: measured before")
            continue
        say(f"{place} ...")
        result = Result.parse(harness.in_child(CHILD, {"run": asdict(run), "data": str(data) if data else None}))
        harness.append(asdict(result), file)
        say(f"    accuracy {result.accuracy:.3f}, {result.train_seconds:.0f} s of training")


# ---------------------------------------------------------------------- the table


def members_of(row: str, results: Sequence[Result]) -> list[Result]:
    """A row's results over seeds: the peer's at its best rate, ours with the newest defaults."""
    if row == PEER:
        best = best_rate(results)
        model = searched(results)[best].run if best is not None else None
    else:
        model = next((result.run for result in reversed(results) if result.run.row == row), None)
    return [result for result in results if model and replace(result.run, seed=model.seed) == model]


def tables(results: Sequence[Result]) -> Iterator[str]:
    """One table an experiment, in Markdown, with the differences and the machine below it."""
    experiments: dict[tuple[Rows, int | None], list[Result]] = {}
    for result in results:
        experiments.setdefault(result.run.experiment, []).append(result)
    for members in experiments.values():
        yield "\n\n".join(["\n".join(table(members)), differences(members), circumstances(members)])


def table(results: Sequence[Result]) -> Iterator[str]:
    """The rows, each as mean and (smallest to largest) over its seeds."""
    heads = (
        "row",
        "learning rate",
        "seeds",
        "epochs run",
        "test accuracy, %",
        "macro F1, %",
        "training, s",
        "cores busy with other work",
        "trained parameters",
        "adapter file, MB",
        "peak memory, MB",
    )
    yield "| " + " | ".join(heads) + " |"
    yield "|---|---|" + "---:|" * (len(heads) - 2)
    for row in (*OURS, PEER):
        members = members_of(row, results)
        if members:
            yield "| " + " | ".join(cells(row, members, results)) + " |"
    if not members_of(PEER, results) and searched(results):
        yield f"\nThe peer's rates so far, by validation accuracy: {search_line(results)}."


def cells(row: str, members: Sequence[Result], results: Sequence[Result]) -> list[str]:
    """The cells of one row."""
    shown = rate(members[0].run.learning_rate)
    return [
        "peft + transformers.Trainer" if row == PEER else f"ours, {row}",
        f"{shown}, best of {search_line(results)} (validation accuracy, %)" if row == PEER else f"{shown}, by default",
        str(len(members)),
        spread([member.epochs_run for member in members], 1),
        spread([100 * member.accuracy for member in members], 1),
        spread([100 * member.macro_f1 for member in members], 1),
        spread([member.train_seconds for member in members], 0),
        spread([member.others_cores for member in members if member.others_cores is not None], 1),
        f"{members[0].trained_parameters:,}",
        spread([member.adapter_bytes / 1e6 for member in members], 2),
        spread([member.peak_bytes / 1e6 for member in members], 0),
    ]


def search_line(results: Sequence[Result]) -> str:
    """The peer's rates with their validation accuracies in percent."""
    tried = searched(results)
    return ", ".join(f"{rate(each)}: {100 * tried[each].validation_accuracy:.1f}" for each in sorted(tried))


def differences(results: Sequence[Result]) -> str:
    """Ours minus the peer, and qlora minus lora, over the seeds that both have."""
    known = {row: {each.run.seed: each.accuracy for each in members_of(row, results)} for row in (*OURS, PEER)}
    parts = []
    for first, second, words in (
        ("lora", PEER, "ours (lora) minus the peer at its best rate"),
        ("qlora", "lora", "qlora minus lora"),
    ):
        seeds = sorted(set(known[first]) & set(known[second]))
        if seeds:
            points = 100 * mean(known[first][seed] - known[second][seed] for seed in seeds)
            numbers = ", ".join(map(str, seeds))
            parts.append(f"{words}: {points:+.1f} points (seed{'s' if len(seeds) > 1 else ''} {numbers})")
    if not parts:
        return "No difference yet: it needs lora beside the peer or qlora."
    share, rows = results[-1].accuracy, results[-1].run.rows.test
    # What chance alone does to one accuracy; the runs share their test rows, so differences vary rather less.
    error = 100 * (share * (1 - share) / rows) ** 0.5
    chance = f"One accuracy over {rows:,} rows has a standard error of {error:.1f} points."
    return f"Test accuracy, {'; '.join(parts)}. {chance}"


def circumstances(results: Sequence[Result]) -> str:
    """Rows, machine and versions; more than one machine or set of versions is there to be seen."""
    rows, asked = results[0].run.experiment
    counts = f"{rows.train:,} training, {rows.validation:,} validation and {rows.test:,} test rows"
    epochs = "each strategy's own number of epochs" if asked is None else f"epochs set to {asked}"
    machines, versions = ({r.machine: 0 for r in results}, {r.versions: 0 for r in results})
    return f"MiniLM on {rows.data}: {counts}, {epochs}. {' and also '.join(machines)}. {' and also '.join(versions)}."


# ---------------------------------------------------------------------- the command


HELP = {
    "train_rows": "rows to train on",
    "test_rows": "rows to test on",
    "seeds": "seeds of lora and the peer; the other rows run once",
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=(__doc__ or "").split("\n")[0])
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", dest="mode", action="store_const", const="quick", help="a small run (the default)")
    size.add_argument("--full", dest="mode", action="store_const", const="full", help="the run to quote")
    parser.set_defaults(mode="quick")
    parser.add_argument("--table", action="store_true", help="print what the results file holds; run nothing")
    parser.add_argument("--results", type=Path, help="results file (benchmarks/.cache/quality-MODE.jsonl)")
    parser.add_argument("--data", type=Path, help="folder with train.csv and test.csv (../shared/data/banking77)")
    for entry in fields(Mode):
        parser.add_argument(f"--{entry.name.replace('_', '-')}", type=positive, metavar="N", help=HELP[entry.name])
    parser.add_argument("--epochs", type=positive, metavar="N", help="of every row, instead of the defaults")
    parser.add_argument(
        "--only", type=harness.row_names((*OURS, PEER)), metavar="ROW[,ROW]", help=f"of {', '.join((*OURS, PEER))}"
    )
    return parser.parse_args()


def data_folder(asked: Path | None) -> Path | None:
    """The rows' folder; None, said aloud, for the embedded set. A folder that was asked for must be there."""
    folder = (asked or DATA).resolve()
    if (folder / "train.csv").is_file() and (folder / "test.csv").is_file():
        return folder
    if asked is not None:
        raise SystemExit(f"no train.csv and test.csv ({asked}). Give their folder, or leave --data out.")
    say(f"banking77 is not beside the checkout: {EMBEDDED} takes its place")
    return None


def main() -> None:
    """Measure, then print the table."""
    asked = arguments()
    file: Path = asked.results or CACHE / f"quality-{asked.mode}.jsonl"
    if asked.table:
        print("\n\n".join(tables(harness.read(file, Result.parse))) or f"nothing measured yet ({file})")
        return
    mode = MODES[asked.mode]
    data, rows = data_folder(asked.data), asked.only or [*OURS, PEER]
    strategies = [row for row in OURS if row in rows or (row == "lora" and PEER in rows)]
    try:
        found = harness.in_child(
            CHILD,
            {
                "strategies": strategies,
                "data": str(data) if data else None,
                "train_rows": asked.train_rows or mode.train_rows,
                "test_rows": asked.test_rows or mode.test_rows,
            },
        )
        runs = plan(rows, asked.seeds or mode.seeds, found, asked.epochs)
        carry_out(runs, file, data)
    except ChildError as fault:
        raise SystemExit(f"{fault}\nWhat was measured before is kept: {file}") from fault
    print(
        "\n\n".join(
            tables(
                [result for result in harness.read(file, Result.parse) if result.run.experiment == runs[0].experiment]
            )
        )
    )


if __name__ == "__main__":
    main()
