"""Settings side by side: mean and spread over seeds, the Pareto front, which to take, whether a probe would do."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, final

COSTS: Final = ("bytes", "parameters", "seconds")  # what a better number is paid with
LETTERS: Final = {"bytes": "B", "parameters": "P", "seconds": "T"}


@final
@dataclass(frozen=True)
class Spread:
    """A number over seeds.

    Attributes:
        mean: over the seeds.
        deviation: sample standard deviation; 0 for one seed.
        values: seed by seed.
    """

    mean: float
    deviation: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """Of some values; None where there are none."""
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.4f}" + (f" ± {self.deviation:.4f}" if len(self.values) > 1 else "")


@final
@dataclass(frozen=True)
class Standing:
    """One setting, all seeds together.

    Attributes:
        name: the setting in a few words.
        strategy: its name.
        solved: its strategy is solved, not stepped: the probe.
        seeds: those that came to an end.
        validation, test: the metric on these rows; test None where there is no such part.
        parameters: that trained. bytes: of the adapter file. seconds: of a training, the mean over seeds.
        peak: bytes of memory, the most over seeds.
        failed: why, for each seed that failed.
        trials: the keys of its trials that came to an end, in the order of `seeds`.
    """

    name: str
    strategy: str
    solved: bool
    seeds: tuple[int, ...]
    validation: Spread | None
    test: Spread | None
    parameters: int
    bytes: int
    seconds: float
    peak: int
    failed: tuple[str, ...]
    trials: tuple[str, ...]

    def cost(self, name: str) -> float:
        """One of `COSTS`."""
        return {"bytes": float(self.bytes), "parameters": float(self.parameters), "seconds": self.seconds}[name]


def standing(name: str, *, solved: bool, results: Sequence[Mapping[str, Any]], metric: str) -> Standing:
    """The standing of a setting from the results of its trials.

    Args:
        name: in a few words.
        solved: see `Standing`.
        results: one a seed, as `trials.read_result` gives them.
        metric: the number that counts.
    """
    done = [result for result in results if result["status"] == "done"]
    tests = [result["test"][metric] for result in done if result.get("test")]
    return Standing(
        name=name,
        strategy=str(results[0]["strategy"]),
        solved=solved,
        seeds=tuple(int(result["seed"]) for result in done),
        validation=Spread.of([result["validation"] for result in done]),
        test=Spread.of(tests) if len(tests) == len(done) else None,
        parameters=max((result["trained_parameters"] for result in done), default=0),
        bytes=max((result["adapter_bytes"] for result in done), default=0),
        seconds=statistics.fmean(result["seconds"] for result in done) if done else 0.0,
        peak=max((result["gpu_bytes"] or result["peak_bytes"] for result in done), default=0),
        failed=tuple(f"seed {result['seed']}: {result['reason']}" for result in results if result["status"] != "done"),
        trials=tuple(str(result["key"]) for result in done),
    )


def front(table: Sequence[Standing], cost: str, *, greater: bool) -> set[str]:
    """The names of the settings that no other beats: none is as cheap and better, or as good and cheaper.

    Chosen by the validation rows.
    """
    found = set()
    scored = [(one, _score(one, greater)) for one in table if one.validation is not None]
    for one, score in scored:
        beaten = any(
            other_score >= score
            and other.cost(cost) <= one.cost(cost)
            and (other_score > score or other.cost(cost) < one.cost(cost))
            for other, other_score in scored
        )
        if not beaten:
            found.add(one.name)
    return found


def best(table: Sequence[Standing], *, greater: bool) -> Standing | None:
    """The setting with the best mean on the validation rows; of equal ones the smaller file."""
    done = [one for one in table if one.validation is not None]
    return max(done, key=lambda one: (_score(one, greater), -one.bytes, -one.seconds), default=None)


def noise(one: Standing, other: Standing) -> float | None:
    """Standard deviation over seeds of the difference of two settings; None where either has one seed alone."""
    if one.validation is None or other.validation is None or min(len(one.seeds), len(other.seeds)) < 2:
        return None
    return math.hypot(one.validation.deviation, other.validation.deviation)


def behind(one: Standing, other: Standing, *, greater: bool) -> float:
    """How much better the other is on the validation rows, in the direction that is better."""
    return _score(other, greater) - _score(one, greater)


def recommended(table: Sequence[Standing], *, greater: bool) -> Standing | None:
    """The setting to take: the smallest file of those that are no further behind the best than the noise over seeds."""
    top = best(table, greater=greater)
    if top is None:
        return None
    near = [
        one
        for one in table
        if one.validation is not None and behind(one, top, greater=greater) <= (noise(one, top) or 0.0)
    ]
    return min(near, key=lambda one: (one.bytes, -_score(one, greater), one.seconds))


def verdict(table: Sequence[Standing], metric: str, *, greater: bool) -> str:
    """One sentence on whether the probe would have been enough."""
    top = best(table, greater=greater)
    if top is None or top.validation is None:
        return "No trial came to an end, so there is nothing to say about a probe."
    probe = best([one for one in table if one.solved], greater=greater)
    if probe is None or probe.validation is None:
        tried = any(one.solved for one in table)
        more = "it failed" if tried else "none was tried: add it with --over strategy=probe,..."
        return f"Whether a probe would have been enough is not known: {more}."
    if probe.name == top.name:
        only = all(one.solved for one in table)
        rest = "nothing else was tried" if only else "nothing that trains the backbone did better"
        return f"The probe was enough: {rest} ({metric} {_numbers(probe)})."
    gap, spread = behind(probe, top, greater=greater), noise(probe, top)
    where = f"{metric} {_numbers(probe)} against {_numbers(top)} of {top.name}"
    if spread is None:
        return (
            f"The probe was {'as good' if gap <= 0 else 'not as good'} ({where}), but with one seed the noise is not "
            "known: say --seeds 3."
        )
    by = f"a difference of {gap:.4f} on the validation rows, the noise over seeds is {spread:.4f}"
    if gap <= spread:
        return f"The probe would have been enough within the noise over seeds: {where}; {by}."
    return f"The probe would not have been enough: {where}; {by}."


def _numbers(one: Standing) -> str:
    tested = f", test {one.test}" if one.test is not None else ""
    return f"{one.validation}{tested}"


def _score(one: Standing, greater: bool) -> float:
    assert one.validation is not None
    return one.validation.mean if greater else -one.validation.mean


# ---------------------------------------------------------------------- as text


def ordered(table: Sequence[Standing], *, greater: bool) -> list[Standing]:
    """The best first, those that failed last."""
    done = [one for one in table if one.validation is not None]
    done.sort(key=lambda one: (-_score(one, greater), one.bytes))
    return done + [one for one in table if one.validation is None]


def cells(table: Sequence[Standing], metric: str, *, greater: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table for people: the best first, the Pareto front marked."""
    fronts = {cost: front(table, cost, greater=greater) for cost in COSTS}
    seeded = max((len(one.seeds) for one in table), default=1) > 1
    header = [
        "",
        "setting",
        f"validation {metric}",
        f"test {metric}",
        "trained",
        "file",
        "peak memory",
        "time",
        "front",
    ]
    rows = []
    for number, one in enumerate(ordered(table, greater=greater), 1):
        if one.validation is None:
            rows.append([str(number), one.name, "failed", "", "", "", "", "", ""])
            continue
        marks = "".join(LETTERS[cost] for cost in COSTS if one.name in fronts[cost])
        few = f" ({len(one.seeds)} of {len(one.seeds) + len(one.failed)} seeds)" if one.failed and seeded else ""
        rows.append(
            [
                *(str(number), one.name + few, str(one.validation), str(one.test) if one.test else ""),
                *(counted(one.parameters), sized(one.bytes), sized(one.peak), f"{one.seconds:.1f} s", marks),
            ]
        )
    if not any(one.test for one in table):
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    return header, rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown, its columns under each other."""
    widths = [max(len(row[place]) for row in [header, *rows]) for place in range(len(header))]
    right = [place not in (1, len(header) - 1) for place in range(len(header))]

    def line(row: Sequence[str]) -> str:
        filled = [
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(row, widths, right, strict=True)
        ]
        return f"| {' | '.join(filled)} |"

    rule = [
        ("-" * (width - 1) + ":" if at_right else "-" * width) for width, at_right in zip(widths, right, strict=True)
    ]
    rule = [part if part.strip(":") else "-:" for part in rule]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def comma_separated(table: Sequence[Standing], metric: str, keys: Sequence[str], values: Mapping[str, Any]) -> str:
    """The table in csv, numbers in full.

    Args:
        table: in the order of the rows.
        metric: the number that counts.
        keys: what was varied.
        values: name of a setting -> its values by these keys.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    scored: list[tuple[str, Callable[[Standing], Spread | None]]] = [
        ("validation", lambda one: one.validation),
        ("test", lambda one: one.test),
    ]
    names = [f"{part}_{metric}{end}" for part, _ in scored for end in ("", "_deviation")]
    writer.writerow(
        [
            *("setting", *keys, "seeds", "failed", *names),
            *("trained_parameters", "adapter_bytes", "peak_bytes", "seconds"),
        ]
    )
    for one in table:
        numbers: list[Any] = []
        for _, of in scored:
            spread = of(one)
            numbers += [spread.mean, spread.deviation] if spread is not None else ["", ""]
        own = [values[one.name].get(key, "") for key in keys]
        costs = [one.parameters, one.bytes, one.peak, round(one.seconds, 3)] if one.seeds else [""] * 4
        writer.writerow([one.name, *own, len(one.seeds), len(one.failed), *numbers, *costs])
    return stream.getvalue()


def sized(number: int) -> str:
    """Bytes for people, in powers of ten."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number} B"


def counted(number: int) -> str:
    """A count for people."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
