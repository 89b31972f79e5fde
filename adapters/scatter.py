"""The picture of a sweep: how good each setting is against what it costs, the Pareto front marked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from adapters import standings
from adapters.standings import Standing

# Okabe and Ito's colours, which people who see few colours tell apart, and shapes beside them.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666", "#000000")
SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "*")
PANELS: Final = (("bytes", "adapter file"), ("seconds", "training time"))
NAMED: Final = 24  # settings that the key lists
FEW_DECADES: Final = 30.0  # half of an axis that spans less has ticks at 1, 2, 5
LIFTS: Final = (5, -12, 17, -24, 29, -36)  # pixels that a number may stand above its point
WIDE: Final = 14  # pixels of a number
HIGH: Final = 11


def draw(table: Sequence[Standing], document: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write sweep.svg and sweep.png.

    Args:
        table: the settings, the best first.
        document: what `Sweep.run` returns: metric, direction, seeds.
        folder: where they go.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [one for one in table if one.validation is not None]
    tested = all(one.test is not None for one in shown)
    metric, greater = str(document["metric"]), bool(document["greater_is_better"])
    strategies = list(dict.fromkeys(one.strategy for one in shown))
    figure = Figure(figsize=(11, 5), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(1, 2, sharey=True)
    for axis, (cost, what) in zip(places, PANELS, strict=True):
        _panel(axis, shown, cost, strategies, tested=tested, greater=greater)
        axis.set_xlabel(what)
    places[0].set_ylabel(f"{'test' if tested else 'validation'} {metric}")
    seeds = len(document["seeds"])
    spread = f", mean and standard deviation over {seeds} seeds" if seeds > 1 else ", one seed"
    figure.suptitle(
        f"{metric} against file size and time{spread}\nringed: Pareto front by the validation rows",
        fontsize=10,
        x=0.01,
        horizontalalignment="left",
    )
    handles = [
        places[0].plot([], [], SHAPES[i % 8], color=COLOURS[i % 8], linestyle="none", label=name)[0]
        for i, name in enumerate(strategies)
    ]
    named = [f"{number}  {one.name}" for number, one in enumerate(shown[:NAMED], 1)]
    named += [f"... {len(shown) - NAMED} more in sweep.md"] if len(shown) > NAMED else []
    blank = [places[0].plot([], [], linestyle="none", label=text)[0] for text in named]
    figure.legend(
        handles=[*handles, *blank],
        loc="outside right center",
        frameon=False,
        fontsize=9,
        handletextpad=0.4,
        handlelength=1.2,
    )
    files = [folder / "sweep.svg", folder / "sweep.png"]
    for file in files:
        stage = file.with_name(f".{file.name}")
        how: dict[str, Any] = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": 110}
        figure.savefig(stage, format=file.suffix[1:], **how)
        stage.replace(file)
    return files


def _panel(
    axis: Any, shown: Sequence[Standing], cost: str, strategies: Sequence[str], *, tested: bool, greater: bool
) -> None:
    """One cost on a logarithmic scale against the number."""
    from matplotlib.ticker import LogLocator

    fronted = standings.front(shown, cost, greater=greater)
    line = sorted((one for one in shown if one.name in fronted), key=lambda one: one.cost(cost))
    seen = {one.name: found for one in shown if (found := one.test if tested else one.validation) is not None}
    axis.plot(
        [one.cost(cost) for one in line],
        [seen[one.name].mean for one in line],
        color="#888888",
        linewidth=1,
        linestyle="--",
        zorder=1,
    )
    for one in shown:
        kind, spread = strategies.index(one.strategy) % 8, seen[one.name]
        axis.errorbar(
            [one.cost(cost)],
            [spread.mean],
            yerr=[spread.deviation] if len(spread.values) > 1 else None,
            fmt=SHAPES[kind],
            color=COLOURS[kind],
            ecolor=COLOURS[kind],
            elinewidth=1,
            capsize=2,
            markersize=7,
            zorder=2,
        )
        if one.name in fronted:
            axis.plot(
                [one.cost(cost)], [spread.mean], "o", markersize=14, markerfacecolor="none", color="#222222", zorder=3
            )
    costs = [one.cost(cost) for one in shown]
    axis.set_xscale("log")
    middle, around = (min(costs) * max(costs)) ** 0.5, max(3.0, (max(costs) / min(costs)) ** 0.6)
    axis.set_xlim(middle / around, middle * around)
    if around < FEW_DECADES:
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.grid(True, color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.xaxis.set_major_formatter(lambda value, _place: _SHOWN[cost](value))
    axis.xaxis.set_minor_formatter(lambda _value, _place: "")
    if not greater:
        axis.invert_yaxis()  # better is up
    _number(axis, [(one.cost(cost), seen[one.name].mean) for one in shown])


def _number(axis: Any, points: Sequence[tuple[float, float]]) -> None:
    """Each point's number beside it, where no other number stands."""
    taken: list[tuple[float, float]] = []
    for number, point in enumerate(points, 1):
        x, y = axis.transData.transform(point)
        places = [(x + side, y + lift) for lift in LIFTS for side in (11, -20)]
        free = (p for p in places if all(abs(p[0] - q[0]) > WIDE or abs(p[1] - q[1]) > HIGH for q in taken))
        place = next(free, places[0])
        taken.append(place)
        shift = (place[0] - x, place[1] - y)
        axis.annotate(str(number), point, xytext=shift, textcoords="offset pixels", fontsize=9)


_SHOWN: Final[Mapping[str, Callable[[float], str]]] = {
    "bytes": lambda value: standings.sized(round(value)),
    "seconds": lambda value: f"{value:g} s",
}
