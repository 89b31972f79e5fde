"""At which weights to put adapters together: tried one after the other on rows, the best kept.

One or two weights are looked for on a grid, more of them at random; then one at a time around the best, by steps that
halve where nothing is better. The same seed and the same answers try the same weights.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

GRID = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # a weight's values on the grid
STEP = 0.2  # the first step around the best weights
FINEST = 0.02  # the last one
DIGITS = 4  # to which weights are rounded


@final
@dataclass(frozen=True)
class Tried:
    """Weights, and what was measured at them.

    Attributes:
        weights: one an adapter.
        numbers: loss and metrics.
        rank: what is compared: larger is better, earlier parts first.
    """

    weights: tuple[float, ...]
    numbers: Mapping[str, float]
    rank: tuple[float, ...]


def weighed(
    start: Sequence[float],
    measure: Callable[[tuple[float, ...]], Mapping[str, float]],
    metric: str,
    greater: bool,
    *,
    trials: int,
    seed: int = 0,
) -> list[Tried]:
    """Try weights within a budget; the first are `start`, so the best is never worse than they are on these rows.

    Args:
        start: weights to begin with.
        measure: takes weights, gives loss and metrics.
        metric: of them the one that decides, the loss where it is equal; greater: whether more of it is better.
        trials: how many weights are measured at most.
        seed: of what is drawn.

    Returns:
        All that was tried, in its order.
    """
    known: dict[tuple[float, ...], Tried] = {}

    def tried(weights: Sequence[float], digits: int = DIGITS) -> Tried | None:
        """What is known of weights; None where the budget is spent."""
        at = tuple(round(weight, digits) + 0.0 for weight in weights)
        if at in known:
            return known[at]
        if len(known) >= trials or not any(at):
            return None
        numbers = dict(measure(at))
        value = numbers[metric] if greater else -numbers[metric]
        known[at] = Tried(at, numbers, tuple(-float("inf") if x != x else x for x in (value, -numbers["loss"])))
        return known[at]

    best = tried(start, digits=300)  # the caller's own, as they are
    assert best is not None
    explored = max(1, trials // 2)
    for weights in itertools.takewhile(lambda _: len(known) < explored, _candidates(start, seed)):
        found = tried(weights)
        best = found if found is not None and found.rank > best.rank else best
    step = STEP
    while step >= FINEST and len(known) < trials:
        before = best
        for place, sign in itertools.product(range(len(start)), (1, -1)):
            moved = list(best.weights)
            moved[place] += sign * step
            if moved[place] < 0 <= start[place]:
                continue  # to take an adapter away has to be asked for
            found = tried(moved)
            best = found if found is not None and found.rank > best.rank else best
        if best is before:
            step /= 2
    return list(known.values())


def chosen(tried: Sequence[Tried]) -> Tried:
    """The best of what was tried; of equals the first."""
    return max(tried, key=lambda one: one.rank)


def _candidates(start: Sequence[float], seed: int) -> Iterator[tuple[float, ...]]:
    """Weights far apart: each adapter alone, equal shares, then a shuffled grid or draws without end."""
    count, draw = len(start), random.Random(seed)
    for place in range(count):
        yield tuple(float(place == other) for other in range(count))
    yield (1 / count,) * count
    yield (1.0,) * count
    if count <= 2:
        grid = list(itertools.product(GRID, repeat=count))
        draw.shuffle(grid)
        yield from grid
        return
    while True:
        shares = [draw.expovariate(1) for _ in start]  # uniform over all divisions (Dirichlet), then of any size
        size = draw.uniform(0.5, 1.5) / sum(shares)
        yield tuple(size * share for share in shares)
