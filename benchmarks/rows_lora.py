"""Rows of the table on LoRA over all layers: how soon it is as good as the peer, and how fast a step is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks import step
from benchmarks.harness import in_child, rate
from benchmarks.kept import Measured
from benchmarks.lines import Line, accuracy, by_time, memory, middle, points, seconds
from benchmarks.rows import OURS, PEER, TUNED, Row, Task, everyone, repeats
from benchmarks.rows_frozen import EQUAL, SOURCES, TINY, rows_of, size, sizes, stepped, trained

Sides = Mapping[str, list[Measured]]
Size = Mapping[str, Any]
SEARCHED = {"smoke": (1e-3,), "quick": (1e-3, 3e-3), "full": (1e-4, 3e-4, 1e-3, 3e-3)}
TARGETS = {"banking77": 10.0, "sst2": 3.0}  # times less than the peer takes
END = 0.90  # of banking77's test rows, what ours has in the end
HERE = (*SOURCES, "benchmarks/rows_lora.py")

# ---------------------------------------------------------------------- no knob: time to the peer's accuracy


def knobless(task: Task) -> dict[str, Any]:
    """Ours with nothing set; the peer at one of its rates, without the evaluations that would cost it time."""
    if task.run.side == OURS:
        return trained(task, "lora", settings={}, validate=True, traced=True)
    settings = {**EQUAL, "learning_rate": float(task.run.side.split()[-1])}
    settings["num_train_epochs"] = task.run.size["epochs"]
    return trained(task, "lora", settings=settings, validate=True)


def at(learning_rate: float) -> str:
    """The peer's side at a rate."""
    return f"{PEER} at {rate(learning_rate)}"


def search(mode: str, case: str, results: Sequence[Measured]) -> list[tuple[str, int]]:
    """Seed 0 of the peer at every rate; its other seeds at the best of them, once that is known."""
    tried = [(at(one), 0) for one in SEARCHED[mode]]
    runs = [(OURS, 0), *tried]
    mine = [result for result in results if result.run.case == case]
    if {side for side, _ in tried} <= {result.run.side for result in mine if result.run.seed == 0}:
        best = best_of({side: [r for r in mine if r.run.side == side] for side, _ in tried})
        seeds = 3 if mode == "full" else 1
        runs += [(side, seed) for seed in range(1, seeds) for side in (OURS, best)]
    return runs


def best_of(sides: Sides) -> str:
    """The rate with the highest validation accuracy at seed 0."""
    found = {
        side: next((result.more["validation"] for result in results if result.run.seed == 0), -1.0)
        for side, results in sides.items()
        if side.startswith(f"{PEER} at")
    }
    return max(found, key=lambda side: found[side]) if found else ""


def reached(result: Measured, goal: float) -> float | None:
    """Seconds until the test accuracy was there; None where it never was."""
    for spent, share in result.more["trace"]:
        there: float = (result.accuracy or 0) if share is None else share
        if there >= goal - 1e-9:
            return float(spent)
    return None


def knobless_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Ours until the accuracy that the peer has in the end, seed by seed, beside the time of the peer's best run."""
    best = best_of(sides)
    peer, ours = ({r.run.seed: r for r in side} for side in (sides.get(best, []), sides[OURS]))
    both = sorted(set(peer) & set(ours))
    times = [reached(ours[seed], peer[seed].accuracy or 0) for seed in both]
    found = [peer[seed].seconds / spent for seed, spent in zip(both, times, strict=True) if spent]
    gap = points(sides[OURS], sides.get(best, []))
    target = f"{TARGETS[case]:g}x to the peer's accuracy"
    met = None
    if both and gap is not None:
        fast = len(found) == len(both) and median(found) >= TARGETS[case]
        if case == "banking77":
            target += f", {100 * END:.0f} % in the end"
            met = fast and min(ours[seed].accuracy or 0 for seed in both) >= END
        else:
            target += ", not lower in the end"
            met = fast and gap >= 0
    never = "" if all(times) else "; not reached by every seed"
    yield Line(
        f"LoRA, no knob, {case}: until the peer's accuracy",
        target,
        f"{size['train']:,} rows; peer {size['epochs']} epochs",
        f"{middle([spent for spent in times if spent])} s of {seconds(sides[OURS])}{never}",
        f"{seconds(sides.get(best, []))} ({best.removeprefix(f'{PEER} ')})",
        middle(found, 1, "x"),
        accuracy=(accuracy(sides[OURS]), accuracy(sides.get(best, []))),
        memory=(memory(sides[OURS]), memory(sides.get(best, []))),
        met=met,
    )


# ---------------------------------------------------------------------- the same number of steps


def steps(task: Task) -> dict[str, Any]:
    """LoRA on all layers, the same steps on both sides from a cold head, no validation."""
    options = {"max_length": task.run.size["max_length"]}
    return trained(task, "lora", settings=stepped(task, 1e-3), options=options)


def steps_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Samples a second against the peer's defaults, and against the peer with length grouping and bf16."""
    for other, at_least in ((PEER, 3.0), (TUNED, 1.3)):
        # The same accuracy: within half a point, or within what chance does to one where the seeds are few.
        line = by_time(
            f"LoRA, all layers, {case}, the same steps; {other if other != PEER else 'peer, defaults'}",
            f"{rows_of(size)}, {size['max_length']} tokens at most",
            sides[OURS],
            sides[other],
            at_least=at_least,
            points_above=-noise(sides[other], size["test"]),
            digits=2,
        )
        speeds = [
            f"{median(r.more['samples'] / r.seconds for r in side):,.1f} samples/s" if side else "-"
            for side in (sides[OURS], sides[other])
        ]
        yield Line(**{**vars(line), "ours": f"{line.ours}, {speeds[0]}", "peer": f"{line.peer}, {speeds[1]}"})


def noise(results: Sequence[Measured], tests: int) -> float:
    """Half a point, or the standard error of a difference of two mean accuracies where that is more."""
    shares = [r.accuracy for r in results if r.accuracy is not None]
    if not shares:
        return 0.5
    share = sum(shares) / len(shares)
    error = 100 * math.sqrt(2 * share * (1 - share) / tests / len(shares))
    return round(max(0.5, error), 1)


# ---------------------------------------------------------------------- the arithmetic floor


FLOORS = {OURS: "ours", PEER: "peer, defaults"}


def floor(task: Task) -> dict[str, Any]:
    """A few steps and the rate of this machine's products, in one process (`benchmarks.step`)."""
    run = step.Run(FLOORS[task.run.side], task.run.case, task.run.seed, learnt=False)
    found = in_child("benchmarks.step_child", {"run": vars(run)}, limit=task.limit, environment=task.environment)
    keys = ("floor_fp32", "floor_bf16", "samples", "tokens", "padded")
    return {
        **{key: found[key] for key in ("seconds", "cpu_seconds", "peak_bytes", "machine")},
        "more": {key: found[key] for key in keys},
    }


def floor_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Processor seconds over those that the products alone would take, at the measured fp32 and bf16 rates."""

    def over(side: str, key: str) -> list[float]:
        return [(r.cpu_seconds or 0) / r.more[key] for r in sides[side]]

    for key, words in (("floor_fp32", "fp32"), ("floor_bf16", "bf16")):
        ours, peer = over(OURS, key), over(PEER, key)
        yield Line(
            f"LoRA step over its arithmetic floor at the {words} rate, {case}",
            "at most 1.35" if words == "fp32" else "-",
            f"{step.SETS[case][0]} rows, 1 epoch",
            middle(ours, 2),
            middle(peer, 2),
            middle([theirs / mine for mine, theirs in zip(ours, peer, strict=False)], 2, "x"),
            memory=(memory(sides[OURS]), memory(sides[PEER])),
            met=(median(ours) <= 1.35 if ours else None) if words == "fp32" else None,
        )


def _steps_sizes() -> dict[str, Any]:
    made = sizes(TINY, size(320, 300, 1), size(2000, 1000, 5), max_length=128)
    long = sizes(TINY, size(48, 100, 1), size(1000, 1000, 2), sets=("imdb",), max_length=256)
    return {mode: {**made[mode], **long[mode]} for mode in made}


BOTH = ("banking77", "sst2")
LORA: dict[str, Row] = {
    "lora": Row(
        "LoRA without a knob, until the accuracy of the peer's best rate",
        sizes(TINY, size(300, 300, 5), size(2000, 1000, 5), sets=BOTH),
        everyone((OURS,)),
        repeats(1, 3),
        *(knobless, knobless_lines, HERE, BOTH, search),
    ),
    "steps": Row(
        "LoRA on all layers, the same number of optimizer steps",
        _steps_sizes(),
        everyone((OURS, PEER, TUNED)),
        repeats(1, 3),
        *(steps, steps_lines, HERE, ("banking77", "imdb")),
    ),
    "floor": Row(
        "a LoRA step against the arithmetic floor",
        {"smoke": {}, "quick": {"banking77": {}}, "full": {"banking77": {}, "imdb": {}}},
        everyone((OURS, PEER)),
        repeats(1, 3),
        *(floor, floor_lines, ("benchmarks/step.py", "benchmarks/step_child.py"), ("banking77",)),
    ),
}
