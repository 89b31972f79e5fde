"""Rows of the table that train no text classifier: a large vocabulary, merging, starting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from benchmarks import startup
from benchmarks.harness import in_child
from benchmarks.kept import Measured
from benchmarks.lines import Line, middle, ratios, seconds
from benchmarks.rows import OURS, PEER, Row, Task, everyone, repeats, same

Sides = Mapping[str, list[Measured]]
Size = Mapping[str, Any]
COPY = "cp"
BESIDE = 300e6  # bytes above an interpreter with torch imported

# ---------------------------------------------------------------------- a large vocabulary


def words(task: Task) -> dict[str, Any]:
    """LoRA steps of a language model (`benchmarks.vocabulary`)."""
    request = {"setting": dict(task.run.size), "side": task.run.side}
    found = in_child("benchmarks.vocabulary", request, limit=task.limit, environment=task.environment)
    return {
        "seconds": found["seconds"],
        "others_cores": found["others_cores"],
        "peak_bytes": found["peak"],
        "more": {"loss": found["loss"]},
    }


def words_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Peak memory above the loaded model as a share of the peer's, and seconds of a step."""
    lighter = ratios(sides[OURS], sides[PEER], lambda r: r.peak_bytes)
    faster = ratios(sides[OURS], sides[PEER], lambda r: r.seconds)

    def shown(side: str) -> str:
        peaks = [(r.peak_bytes or 0) / 1e6 for r in sides[side]]
        losses = middle([r.more["loss"] for r in sides[side]], 3)
        return f"{middle(peaks, 0)} MB above the model, {seconds(sides[side])} a step, loss {losses}"

    yield Line(
        f"causal-LM LoRA, vocabulary of {case}",
        "half the peak memory, not slower",
        f"{size['rows']} x {size['length']} tokens, {size['steps']} steps",
        shown(OURS),
        shown(PEER),
        f"memory {middle(lighter, 2, 'x')}, time {middle(faster, 2, 'x')}",
        met=median(lighter) >= 2 and median(faster) >= 1 if lighter and faster else None,
    )


# ---------------------------------------------------------------------- merging


def merge(task: Task) -> dict[str, Any]:
    """One merge, in a process of its own (`benchmarks.merging`); the weights are made once and kept."""
    request = {"gigabytes": float(task.run.case.split()[0]), "side": task.run.side, "output": str(task.folder / "out")}
    return in_child("benchmarks.merging_child", request, limit=task.limit, environment=task.environment)


def merge_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """Against a copy of the same files, and against peft."""
    peak = max((r.peak_bytes or 0 for r in sides[OURS]), default=None)
    light = f"{peak / 1e6:,.0f}" if peak is not None else "-"
    small = None if peak is None else peak <= BESIDE
    for other, target in ((COPY, 1 / 1.3), (PEER, 3.0)):
        found = ratios(sides[OURS], sides[other], lambda r: r.seconds)
        fast = median(found) >= target if found else None
        if sides[other] or other == COPY:
            theirs = max((r.peak_bytes or 0 for r in sides[other]), default=None)
            yield Line(
                f"merge, {case}, against {'cp' if other == COPY else 'peft'}",
                "at most 1.3x its time, under 300 MB" if other == COPY else "3x",
                size["words"],
                seconds(sides[OURS]),
                seconds(sides[other]),
                middle(found, 2, "x"),
                memory=(light, "-" if theirs is None else f"{theirs / 1e6:,.0f}"),
                met=None if fast is None else fast and (other == PEER or bool(small)),
            )


# ---------------------------------------------------------------------- starting


COMMANDS = {
    OURS: ["-c", "import adapters"],
    PEER: ["-c", "import peft"],
    "adapters --help": ["-m", "adapters", "--help"],
    "python": ["-c", "pass"],
}


def start(task: Task) -> dict[str, Any]:
    """Wall seconds of one process that does nothing else."""
    return {"seconds": startup.seconds(COMMANDS[task.run.side])}


def start_lines(case: str, size: Size, sides: Sides) -> Iterator[Line]:
    """`import adapters` beside `import peft`; the command's help beside the bare interpreter."""
    for what, ours, other in (
        ("import adapters; peer: import peft", OURS, PEER),
        ("adapters --help; beside python -c pass", "adapters --help", "python"),
    ):
        found = ratios(sides[ours], sides[other], lambda r: r.seconds)
        yield Line(what, "-", "", seconds(sides[ours]), seconds(sides[other]), middle(found, 2, "x"))


def _vocabularies(*counts: int) -> dict[str, Any]:
    return {f"{count:,}": {"vocabulary": count, "rows": max(1, 8 * 32_000 // count)} for count in counts}


def _setting(cases: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {case: {"length": 256, "steps": 6, "dtype": "float32", **size, **more} for case, size in cases.items()}


def _gigabytes(*sizes: float) -> dict[str, Any]:
    return {f"{size:g} GB": {"words": f"{size:g} GB in fp32, LoRA on every linear map"} for size in sizes}


def merging_plan(mode: str, case: str, results: Any) -> list[tuple[str, int]]:
    """Three sides in turn; at 6 GB ours and the copy alone, whose memory is what counts."""
    sides = (COPY, OURS) if case == "6 GB" else (COPY, OURS, PEER)
    return [(side, number) for number in range({"smoke": 1, "quick": 2, "full": 5}[mode]) for side in sides]


FILES: dict[str, Row] = {
    "vocabulary": Row(
        "LoRA of a language model with a large vocabulary",
        {
            "smoke": _setting({"500": {"vocabulary": 500, "rows": 2}}, length=16, steps=3),
            "quick": _setting(_vocabularies(32_000), steps=4),
            "full": _setting(_vocabularies(32_000, 128_000)),
        },
        everyone((OURS, PEER)),
        repeats(1, 3),
        *(words, words_lines, ("benchmarks/vocabulary.py",)),
    ),
    "merge": Row(
        "merging into a checkpoint on disk",
        {"smoke": _gigabytes(0.3), "quick": _gigabytes(0.5), "full": _gigabytes(1.7, 6)},
        everyone((COPY, OURS, PEER)),
        repeats(2, 5),
        *(merge, merge_lines, ("benchmarks/merging.py", "benchmarks/merging_child.py"), (), merging_plan),
    ),
    "startup": Row(
        "starting",
        same({"": {}}),
        everyone(tuple(COMMANDS)),
        repeats(3, 11),
        *(start, start_lines, ("benchmarks/startup.py",)),
    ),
}
