"""The lines of the table: two sides compared over their repeats, and whether that is what was aimed at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.kept import Measured

HEADS = (
    "what",
    "at least",
    "size",
    "ours",
    "peer",
    "ratio (spread)",
    "by processor time",
    "accuracy, %: ours",
    "peer",
    "peak memory, MB: ours",
    "peer",
    "met",
)
WORDS = {True: "yes", False: "**no**", None: "-"}


@dataclass(frozen=True)
class Line:
    """One comparison; met is None where nothing was aimed at, or where it cannot be told."""

    what: str
    target: str
    size: str
    ours: str
    peer: str
    ratio: str
    by_cpu: str = "-"
    accuracy: tuple[str, str] = ("-", "-")
    memory: tuple[str, str] = ("-", "-")
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        """In the order of the heads."""
        front = (self.what, self.target, self.size, self.ours, self.peer, self.ratio, self.by_cpu)
        return (*front, *self.accuracy, *self.memory, WORDS[self.met])


def markdown(lines: Sequence[Line]) -> str:
    """The table."""
    rows = [HEADS, ("---",) * len(HEADS), *(line.cells() for line in lines)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


# ---------------------------------------------------------------------- numbers


def middle(values: Sequence[float], digits: int = 1, unit: str = "") -> str:
    """The median, and smallest and largest where they differ; a dash where nothing is known."""
    if not values:
        return "-"
    low, half, high = (f"{value:,.{digits}f}" for value in (min(values), median(values), max(values)))
    return f"{half}{unit}" if low == high else f"{half}{unit} ({low} to {high})"


def seconds(results: Sequence[Measured]) -> str:
    """Seconds, with as many digits as say something."""
    values = [result.seconds for result in results]
    return middle(values, 1 if values and median(values) >= 1 else 3, " s")


def ratios(
    ours: Sequence[Measured], peer: Sequence[Measured], value: Callable[[Measured], float | None]
) -> list[float]:
    """The peer's value over ours, seed by seed: what ran side by side is compared."""
    mine, theirs = ({r.run.seed: value(r) for r in side} for side in (ours, peer))
    return [
        theirs[seed] / mine[seed]  # type: ignore[operator]
        for seed in sorted(set(mine) & set(theirs))
        if mine[seed] and theirs[seed] is not None
    ]


def accuracy(results: Sequence[Measured]) -> str:
    """Test accuracy in percent."""
    return middle([100 * r.accuracy for r in results if r.accuracy is not None])


def memory(results: Sequence[Measured]) -> str:
    """The highest peak, in megabytes."""
    known = [r.peak_bytes for r in results if r.peak_bytes is not None]
    return f"{max(known) / 1e6:,.0f}" if known else "-"


def points(ours: Sequence[Measured], peer: Sequence[Measured]) -> float | None:
    """Mean accuracy of ours less the peer's, in points, over the seeds that both have."""
    mine, theirs = ({r.run.seed: r.accuracy for r in side if r.accuracy is not None} for side in (ours, peer))
    both = sorted(set(mine) & set(theirs))
    return 100 * sum(mine[seed] - theirs[seed] for seed in both) / len(both) if both else None


def by_time(
    what: str,
    size: str,
    ours: Sequence[Measured],
    peer: Sequence[Measured],
    *,
    at_least: float,
    points_above: float | None = None,
    digits: int = 1,
) -> Line:
    """The peer's seconds over ours; with `points_above` ours must be that many points above, too (-0.5: below)."""
    found = ratios(ours, peer, lambda result: result.seconds)
    gap = points(ours, peer)
    fast = median(found) >= at_least if found else None
    good = True if points_above is None else None if gap is None else gap >= points_above - 1e-9
    target = f"{at_least:g}x"
    if points_above is not None:
        target += ", accuracy "
        target += f"{points_above:g} points above" if points_above > 0 else f"at most {-points_above:g} points below"
    return Line(
        what,
        target,
        size,
        seconds(ours),
        seconds(peer),
        middle(found, digits, "x"),
        middle(ratios(ours, peer, lambda result: result.cpu_seconds), digits, "x"),
        (accuracy(ours), accuracy(peer)),
        (memory(ours), memory(peer)),
        None if fast is None or good is None else fast and good,
    )
