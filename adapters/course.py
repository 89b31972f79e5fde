"""The course of a run: whether it still gets better, whether its loss rose again, whether it beat its baseline."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import median
from typing import Any, final

from transformers import TrainerCallback

WINDOW = 16  # steps of the moving median
LOST = 0.5  # share of what was gained that a run may lose again
HELD = WINDOW // 2  # steps in a row that it has to stay there
NOISE = 2.0  # times the median step from one loss to the next, which a run that drifts away does not raise
RISE = 0.2  # share of the first median that it may rise above its best in any case


@final
class Divergence(TrainerCallback):
    """Says once that the moving median of the loss has risen for good.

    A single bad batch does not move a median of 16 steps. What counts as risen: above the best median by more than
    half of what the run had gained until then, by a fifth of where it began, and by twice what one batch's loss lay
    from the next one's at its best, for 8 steps in a row. The last bound is for runs that begin with a head
    that was solved: their first losses are small, and a fifth of them is less than two batches lie apart.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._step = 0.0
        self._first = self._best = float("nan")
        self._best_step, self._apart = 0, 0.0
        self._risen = 0
        self.said = False

    def add(self, loss: float) -> None:
        """The share of one micro-batch in the loss of the step."""
        self._step += loss

    def lately(self) -> float | None:
        """The median loss of the last steps, that at hand included; None before the first."""
        losses = [*self._losses, *([self._step] if self._step else [])]
        return median(losses) if losses else None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more; its loss is the sum over its micro-batches."""
        self._losses.append(self._step)
        self._step = 0.0
        if len(self._losses) < WINDOW or self.said:
            return
        now = median(self._losses)
        if not now >= self._best:  # also the first one, against nan
            self._first = now if self._first != self._first else self._first
            self._best, self._best_step = now, state.global_step
            noise = NOISE * median(abs(after - before) for before, after in pairwise(self._losses))
            self._apart = min(noise, LOST * abs(self._first))  # where all is lost from the start, noise says nothing
        risen = now - self._best > max(LOST * (self._first - self._best), RISE * abs(self._first), self._apart)
        self._risen = self._risen + 1 if risen else 0
        if self._risen == HELD:
            self.said = True
            self._say(
                f"the loss diverged: median {now:.4g} over the {WINDOW} steps up to {state.global_step}, after "
                f"{self._best:.4g} up to step {self._best_step}; take a smaller learning rate or fewer epochs"
            )


def unbeaten(
    found: float | None, baseline: Mapping[str, float], metric: str, *, greater: bool, rows: str
) -> str | None:
    """What is said of a run whose best metric is no better than the baseline's; None where it is better.

    Args:
        found: the best value, None where nothing was measured.
        baseline: the metrics of the answer that never looks at the input.
        metric: its name in them.
        greater: greater is better.
        rows: what it was measured on.
    """
    if found is None or metric not in baseline:
        return None
    bound = baseline[metric]
    if found > bound if greater else found < bound:
        return None
    return (
        f"the run never beat its baseline: {metric} {found:.4g} on the {rows} rows, where an answer that never looks "
        f"at the input has {bound:.4g}"
    )


def beats(results: Mapping[str, Mapping[str, float]], metric: str, *, greater: bool) -> bool:
    """Whether a run's test is better than both answers that learnt nothing.

    Args:
        results: numbers of "test", "majority" and "untrained".
        metric: by which.
        greater: is better.
    """
    ours = results["test"][metric]
    others = [results[name][metric] for name in ("majority", "untrained") if metric in results[name]]
    return all(ours > other if greater else ours < other for other in others)
