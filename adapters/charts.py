"""Numbers to the places of lines, points, bars and ticks in a picture of fixed size; a page draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, final

WIDTH, HEIGHT = 460, 250  # of a picture, in its own units
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 34  # margins
SPREAD = 30.0  # the greatest over the least positive value from which an axis is logarithmic
Point = tuple[float, float]


def short(value: float, digits: int = 4) -> str:
    """A number as an axis shows it, of at most so many digits."""
    size = abs(value)
    if size >= 1e6 or (size and size < 1e-3):
        mantissa, power = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(power)}"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.{digits}g}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most so many."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: powers of ten, with 2 and 5 between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    return [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]


@final
class Axis:
    """One axis: from values to places.

    Args:
        values: what is to be seen on it.
        begin, end: its two ends in the picture.
        log: logarithmic; for positive values.
        exact: it ends at the values themselves, without room beside them.
    """

    def __init__(
        self, values: Sequence[float], begin: float, end: float, *, log: bool = False, exact: bool = False
    ) -> None:
        self.begin, self.end, self.log = begin, end, log
        low, high = min(values), max(values)
        if log:
            low, high = low / 1.15, high * 1.15
        elif low == high:
            low, high = low - (abs(low) or 1.0) * 0.5, high + (abs(high) or 1.0) * 0.5
        elif not exact:
            room = 0.05 * (high - low)
            low, high = low - room if low < 0 or low - room > 0 else 0.0, high + room
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        """The place of a value."""
        share = (
            math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
            if self.log
            else (value - self.low) / (self.high - self.low)
        )
        return round(self.begin + share * (self.end - self.begin), 1)

    def ticks(self, most: int = 5, *, whole: bool = False) -> list[dict[str, Any]]:
        """Places and labels of its ticks; whole numbers alone where nothing lies between them."""
        found = decades(self.low, self.high) if self.log else ticks(self.low, self.high, most)
        if whole:
            found = [value for value in found if value == int(value)]
        return [{"at": self(value), "label": short(value, 6)} for value in found]


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """The running mean of the last `window` values."""
    found, total = [], 0.0
    for place, (x, y) in enumerate(points):
        total += y - (points[place - window][1] if place >= window else 0.0)
        found.append((x, total / min(place + 1, window)))
    return found


def lines(
    series: Sequence[Mapping[str, Any]],
    floors: Sequence[tuple[str, float]] = (),
    *,
    x: str,
    y: str,
    ends: tuple[float, float] | None = None,
) -> dict[str, Any] | None:
    """A picture of lines over one axis; None where there is nothing to draw.

    Args:
        series: each with "name", "look" (a class of the page's style), "points", and perhaps "dots" (drawn too).
        floors: horizontal lines with their names.
        x, y: what the axes show.
        ends: of the upright axis; None for as far as the values go, logarithmic where they go far apart.
    """
    drawn = [entry for entry in series if entry["points"]]
    values = [point[1] for entry in drawn for point in entry["points"]]
    if not values:
        return None
    values += [value for _, value in floors]
    log = ends is None and min(values) > 0 and max(values) / min(values) > SPREAD
    across = Axis([p[0] for entry in drawn for p in entry["points"]], LEFT, WIDTH - RIGHT, exact=True)
    up = Axis(ends or values, HEIGHT - BOTTOM, TOP, log=log, exact=ends is not None)

    def place(point: Point) -> str:
        return f"{across(point[0])} {up(point[1])}"

    return {
        "series": [
            {
                "name": entry["name"],
                "look": entry["look"],
                "path": "M" + "L".join(map(place, entry["points"])) if len(entry["points"]) > 1 else "",
                "dots": [
                    [across(a), up(b), f"{entry['name']}: {short(b)} at {x} {short(a)}"] for a, b in entry["points"]
                ]
                if entry.get("dots") or len(entry["points"]) == 1
                else [],
            }
            for entry in drawn
        ],
        "floors": [{"name": name, "at": up(value), "value": short(value)} for name, value in floors],
        "across": across.ticks(6, whole=all(p[0] == int(p[0]) for entry in drawn for p in entry["points"])),
        "up": up.ticks(),
        "x": x,
        "y": f"{y}, logarithmic" if log else y,
    }


def scatter(points: Sequence[Point], *, x: str, y: str) -> dict[str, Any] | None:
    """Points in a square whose two axes are one, with the diagonal."""
    if not points:
        return None
    side = 350
    values = [value for point in points for value in point]
    across = Axis(values, LEFT, LEFT + side)
    up = Axis(values, TOP + side, TOP)
    return {
        "side": side,
        "points": [[across(a), up(b)] for a, b in points],
        "across": across.ticks(),
        "up": up.ticks(),
        "x": x,
        "y": y,
    }


def bars(counts: Sequence[float], edges: Sequence[float], *, x: str) -> dict[str, Any] | None:
    """A histogram."""
    if not counts or len(edges) != len(counts) + 1 or edges[-1] < edges[0]:
        return None
    height = 150
    across = Axis(edges, LEFT, WIDTH - RIGHT, exact=True)
    up = Axis([0.0, max(counts)], height - BOTTOM, TOP, exact=True)
    return {
        "height": height,
        "bars": [
            {
                "x": across(low),
                "y": up(count),
                "width": max(0.8, across(high) - across(low) - 1),
                "height": round(up(0.0) - up(count), 1),
                "said": f"{short(low)} to {short(high)}: {count:g}",
            }
            for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
        ],
        "across": across.ticks(6),
        "up": up.ticks(3, whole=True),
        "x": x,
    }


def reliability(bins: Sequence[Mapping[str, float]], of: int) -> dict[str, Any]:
    """A reliability diagram: how often answers were right, by the certainty that they were given with."""
    side = 350
    across = Axis([0.0, 1.0], LEFT, LEFT + side, exact=True)
    up = Axis([0.0, 1.0], TOP + side, TOP, exact=True)
    width = side / 10
    return {
        "side": side,
        "bars": [
            {
                "x": round(LEFT + entry["bin"] * width + 1, 1),
                "width": round(width - 2, 1),
                "y": up(entry["accuracy"]),
                "height": round(up(0.0) - up(entry["accuracy"]), 1),
                "mark": up(entry["confidence"]),
                "said": f"certainty {entry['confidence']:.2f}: right {entry['accuracy']:.2f} of {entry['rows']:g}",
                "strong": round(0.35 + 0.65 * math.sqrt(entry["rows"] / max(of, 1)), 2),
            }
            for entry in bins
        ],
        "across": across.ticks(),
        "up": up.ticks(),
    }


def matrix(cells: Sequence[Sequence[int]], size: int) -> dict[str, Any]:
    """The cells of a large confusion matrix in a square, each shaded by its share of its row."""
    side = 420
    step = side / size
    sums: dict[int, int] = {}
    for right, _, rows in cells:
        sums[right] = sums.get(right, 0) + rows
    return {
        "side": side,
        "step": round(step, 3),
        "cells": [
            {
                "x": round(said * step, 2),
                "y": round(right * step, 2),
                "right": right,
                "said": said,
                "rows": rows,
                "share": round(0.25 + 0.75 * rows / sums[right], 2),
                "hit": right == said,
            }
            for right, said, rows in cells
        ],
    }
