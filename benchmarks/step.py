"""A LoRA step on all linear maps: ours against peft + transformers.Trainer, the levers one by one, and the floor.

    python -m benchmarks.step                one thread, short and long texts, three rounds in turn
    python -m benchmarks.step --quick        short texts alone, one round of the rows that matter
    python -m benchmarks.step --accuracy     what each side answers after the same number of steps, three seeds

The floor is 4 x parameters x tokens (a product forward, one backward to the input, two operations a parameter each)
at the rate that this machine multiplies the model's own shapes at, measured in the same process. Seconds are those
between the first step's beginning and the last one's end; the process's own CPU seconds stand beside them, because
other work on the same cores moves only the former. Run it with OMP_NUM_THREADS=1 and on one core (taskset) for figures
that can be compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness import CACHE, ROOT, append, in_child, positive, read, say, spread

DATA = ROOT.parent / "shared" / "data"
PEERS: Mapping[str, Mapping[str, Any]] = {
    "peer, defaults": {},
    "peer, length grouping": {"train_sampling_strategy": "group_by_length"},
    "peer, bf16": {"bf16": True},
    "peer, length grouping and bf16": {"train_sampling_strategy": "group_by_length", "bf16": True},
}
PLAIN = {"frozen_dropout": True, "fused": False, "train_sampling_strategy": "random"}
OURS: Mapping[str, Mapping[str, Any]] = {
    "ours": {},
    "ours, rows in random order": {"train_sampling_strategy": "random"},
    "ours, bf16 off": {"bf16": False},
    "ours, fused off": {"fused": False},
    "ours, frozen dropout on": {"frozen_dropout": True},
    "ours, no lever": PLAIN,
}
QUICK = ("peer, defaults", "peer, length grouping and bf16", "ours", "ours, bf16 off")
ACCURACY = ("ours", "ours, bf16 off", "ours, frozen dropout on and bf16 off", "peer, defaults")
SETTINGS = {**PEERS, **OURS, "ours, frozen dropout on and bf16 off": {"frozen_dropout": True, "bf16": False}}
# rows timed, rows learnt from, epochs, learning rate, tokens of a row at most
SETS = {
    "banking77": (320, 1000, 6, 2e-3, 128),
    "sst2": (320, 1000, 4, 1e-3, 128),
    "imdb": (96, 400, 3, 1e-3, 256),
}


@dataclass(frozen=True)
class Run:
    """One measurement; all of it together is the key in the results file."""

    row: str
    data: str
    seed: int
    learnt: bool  # trained to the end and tested, instead of timed over a few steps


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    run: Run
    samples: int  # that passed
    steps: int
    tokens: int  # of the rows
    padded: int  # that went through the model
    seconds: float
    cpu_seconds: float
    floor_fp32: float  # seconds that the arithmetic of these tokens takes at the fp32 rate
    floor_bf16: float
    peak_bytes: int
    accuracy: float | None
    machine: str

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Result:
        """A result from plain data."""
        return cls(**{**plain, "run": Run(**plain["run"])})


def results(
    *, quick: bool = True, rounds: int = 1, names: Sequence[str] | None = None, sets: Sequence[str] | None = None
) -> list[Result]:
    """Timed steps, all rows in turn, a process each.

    Args:
        quick: the rows that matter, on short texts.
        rounds: how often.
        names, sets: of rows and data, instead of those that `quick` decides.
    """
    chosen = names or (QUICK if quick else (*PEERS, *OURS))
    runs = [
        Run(name, data, number, learnt=False)
        for number in range(rounds)
        for data in sets or (("banking77",) if quick else ("banking77", "imdb"))
        for name in chosen
    ]
    return [_measured(run) for run in runs]


def accuracies(*, seeds: int = 3, sets: Sequence[str] | None = None, file: Path | None = None) -> list[Result]:
    """Test accuracy after the same number of steps; resumable run by run."""
    done = read(file, Result.parse) if file is not None else []
    known = {result.run for result in done}
    for seed in range(seeds):
        for data in sets or ("banking77", "sst2"):
            for name in ACCURACY:
                if (run := Run(name, data, seed, learnt=True)) not in known:
                    done.append(_measured(run))
                    if file is not None:
                        append(asdict(done[-1]), file)
    return done


def _measured(run: Run) -> Result:
    result = Result.parse(in_child("benchmarks.step_child", {"run": asdict(run)}))
    answered = "" if result.accuracy is None else f", accuracy {100 * result.accuracy:.1f} %"
    say(f"{run.data}, {run.row}, {run.seed}: {result.samples / result.cpu_seconds:.1f} samples a CPU second{answered}")
    return result


def table(found: Sequence[Result]) -> list[str]:
    """Medians over the rounds, as a Markdown table for each data set."""
    lines: list[str] = []
    for data in dict.fromkeys(result.run.data for result in found):
        lines += [
            "",
            f"{data}:",
            "",
            "| row | samples a CPU second, median (all) | times the peer's defaults | samples a second | tokens a CPU "
            "second | padding | step over the floor at the fp32 rate (at the bf16 rate) | peak memory, MB |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        mine = [result for result in found if result.run.data == data]
        first = [r.samples / r.cpu_seconds for r in mine if r.run.row == "peer, defaults"]
        for row in dict.fromkeys(result.run.row for result in mine):
            runs = [result for result in mine if result.run.row == row]
            speeds = [r.samples / r.cpu_seconds for r in runs]
            over, low = (
                median(r.cpu_seconds / f for r, f in zip(runs, floors, strict=True)) for floors in _floors(runs)
            )
            lines.append(
                f"| {row} | {median(speeds):.1f} ({', '.join(f'{s:.1f}' for s in speeds)}) | "
                f"{f'{median(speeds) / median(first):.2f}' if first else '-'} | "
                f"{median(r.samples / r.seconds for r in runs):.1f} | "
                f"{median(r.tokens / r.cpu_seconds for r in runs):,.0f} | {1 - runs[0].tokens / runs[0].padded:.0%} | "
                f"{over:.2f} ({low:.2f}) | {max(r.peak_bytes for r in runs) / 1e6:,.0f} |"
            )
    return [*lines, "", found[0].machine] if found else []


def _floors(runs: Sequence[Result]) -> tuple[list[float], list[float]]:
    return [r.floor_fp32 for r in runs], [r.floor_bf16 for r in runs]


def accuracy_table(found: Sequence[Result]) -> list[str]:
    """Mean, smallest and largest test accuracy over the seeds, beside the time that training took."""
    lines = [
        "| data | row | seeds | steps | test accuracy, % | CPU seconds of training |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for data in dict.fromkeys(result.run.data for result in found):
        for row in dict.fromkeys(result.run.row for result in found if result.run.data == data):
            runs = [r for r in found if r.run.data == data and r.run.row == row]
            answered = spread([100 * (r.accuracy or 0) for r in runs], 1)
            took = spread([r.cpu_seconds for r in runs], 0)
            lines.append(f"| {data} | {row} | {len(runs)} | {runs[0].steps} | {answered} | {took} |")
    return [*lines, "", found[0].machine] if found else []


def main() -> None:
    """Measure, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short texts alone, one round of the rows that matter")
    parser.add_argument("--accuracy", action="store_true", help="test accuracy instead of time (resumable)")
    parser.add_argument("--rounds", type=positive, default=3, help="rounds of timed steps")
    parser.add_argument("--seeds", type=positive, default=3, help="seeds of --accuracy")
    parser.add_argument("--data", choices=sorted(SETS), action="append", help="data sets")
    options: Any = parser.parse_args()
    if options.accuracy:
        file = CACHE / "step_accuracy.jsonl"
        print("\n".join(accuracy_table(accuracies(seeds=options.seeds, sets=options.data, file=file))))
    else:
        rounds = 1 if options.quick else options.rounds
        print("\n".join(table(results(quick=options.quick, rounds=rounds, sets=options.data))))


if __name__ == "__main__":
    main()
