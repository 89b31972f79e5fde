"""Which settings of a sweep are tried: all of a grid, some at random, or those that optuna proposes."""

from __future__ import annotations

import random
from typing import Any, Final, Literal, final

from adapters import axes
from adapters.axes import Axis
from adapters.errors import MissingPackageError, RequestError, message
from adapters.trials import Setting, Space

Kind = Literal["grid", "random", "optuna"]
ATTEMPTS: Final = 50  # draws for each setting wanted, until no new one is expected


def listed(space: Space, kind: Kind, count: int | None, limit: int | None, seed: int) -> tuple[list[Setting], str]:
    """The settings of a grid or of a random draw, each once, those of one backbone together; and a line to be said.

    Args:
        space: what they are made of.
        kind: "grid" or "random".
        count: of random settings.
        limit: the most settings; of a larger grid so many are drawn.
        seed: of the draw.

    Raises:
        RequestError: values that a recipe refuses; a range in a grid.
    """
    generator = random.Random(seed)
    said = ""
    if kind == "grid":
        settings = space.settings(axes.product(space.over))
        if limit is not None and len(settings) > limit:
            said = f"of {len(settings)} settings {limit} are drawn at random (seed {seed})"
            kept = set(generator.sample(range(len(settings)), limit))
            settings = [one for place, one in enumerate(settings) if place in kept]
    else:
        wanted = min(count or 0, limit or count or 0)
        found: dict[str, Setting] = {}
        for _ in range(ATTEMPTS * wanted):
            made = space.setting(axes.drawn(space.over, generator))
            found.setdefault(made.key, made)
            if len(found) == wanted:
                break
        settings = list(found.values())
        if len(settings) < wanted:
            said = f"there are no more than {len(settings)} different settings to draw"
    return sorted(settings, key=lambda one: (str(one.recipe.model), str(one.recipe.quantization), not one.solved)), said


@final
class Study:
    """optuna's proposals, one after another; the same for the same seed and the same answers.

    Args:
        space: what settings are made of.
        seed: of its sampler.
        greater: whether a greater number is better.

    Raises:
        MissingPackageError: optuna is not installed.
    """

    def __init__(self, space: Space, seed: int, *, greater: bool) -> None:
        optuna = need_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space, self._optuna = space, optuna
        direction = "maximize" if greater else "minimize"
        self._study: Any = optuna.create_study(direction=direction, sampler=optuna.samplers.TPESampler(seed=seed))
        self._trial: Any = None

    def ask(self) -> Setting:
        """The next setting; the strategy is chosen first, and what does not apply to it is not chosen at all."""
        self._trial = self._study.ask()
        values: dict[str, Any] = {}
        for one in sorted(self._space.over, key=lambda one: one.key != "strategy"):
            if self._space.needs(one.key, values):
                values[one.key] = self._value(one)
        return self._space.setting(values)

    def _value(self, one: Axis) -> Any:
        if not one.ranges:
            return one.values[self._trial.suggest_categorical(one.key, list(range(len(one.values))))]
        if one.whole:
            return self._trial.suggest_int(one.key, int(one.low), int(one.high), log=one.log)
        return float(f"{self._trial.suggest_float(one.key, one.low, one.high, log=one.log):.3g}")

    def tell(self, value: float | None) -> None:
        """What the last setting came to; None where it failed."""
        if value is None:
            self._study.tell(self._trial, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trial, value)


def need_optuna() -> Any:
    """optuna, which is imported only where it is asked for.

    Raises:
        MissingPackageError: naming the extra.
    """
    try:
        import optuna
    except ImportError as fault:
        raise MissingPackageError(
            message(
                "optuna is not installed", where="search", remedy='Run: pip install "holdfast[sweep]".', found=fault
            )
        ) from fault
    return optuna


def check(kind: Kind, count: int | None, over: tuple[Axis, ...]) -> None:
    """Look at what was asked for before anything is drawn.

    Raises:
        RequestError: nothing varies over; a number of trials where there is none, or none where there has to be one.
        MissingPackageError: optuna is not installed.
    """
    if kind == "grid" and count is not None:
        raise RequestError(
            message("a grid has as many settings as it has", where="trials", remedy="Say --limit, or --search random.")
        )
    if kind != "grid" and count is None:
        raise RequestError(
            message("how many settings?", where=f"search {kind}", expected="--trials N", remedy="Say --trials 20.")
        )
    if kind != "grid" and not over:
        raise RequestError(message("nothing to choose among", where=f"search {kind}", expected="--over KEY=VALUES"))
    if kind == "optuna":
        need_optuna()
