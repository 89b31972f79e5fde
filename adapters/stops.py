"""What ends a run before its last step: a signal, or the patience with evaluations that bring nothing."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NoReturn, final

from transformers import EarlyStoppingCallback, TrainerCallback

from adapters import attendance, interrupts

logger = logging.getLogger(__name__)


@final
class Stops(TrainerCallback):
    """Ctrl-C and SIGTERM: the first saves at the end of the step and stops, the second stops at once.

    Before the first step there is nothing to save: the first stops at once.

    Args:
        onward: how to go on, for a person.
        alone: the run is this process alone; else the signal counts when all of its processes know of it.

    Attributes:
        came: the signal that this process was sent, 0 for none.
        number: the one that the run stops for, 0 for none.
    """

    def __init__(self, onward: str, *, alone: bool = True) -> None:
        self.came = self.number = 0
        self.onward = onward
        self.alone = alone
        self._old: dict[int, Any] = {}
        self._due = self._stepping = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take the signals meanwhile; outside the main thread, and where they are ignored, they are left alone."""
        self.came = self.number = 0
        self._due = self._stepping = False
        self._old = {}
        if threading.current_thread() is threading.main_thread():
            found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._old = {number: old for number, old in found.items() if old not in (None, signal.SIG_IGN)}
        for number in self._old:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            self._give_back()

    def _take(self, number: int, _frame: Any) -> None:
        self._give_back()  # a second one does what it always did
        if not self._stepping:
            self._end(number)
        self.came = number
        if self.alone:
            self.number = number
        with contextlib.suppress(RuntimeError):  # it came while a line was being written
            name = signal.Signals(number).name
            logger.warning("%s: the run stops when its next step is saved; a second one stops it at once", name)

    def _give_back(self) -> None:
        for number, old in self._old.items():
            if signal.getsignal(number) == self._take:
                signal.signal(number, old)

    def stop(self, step: int) -> NoReturn:
        """End as the signal would have ended the process, now that everything is saved."""
        name = signal.Signals(self.number).name
        line = f"stopped by {name} after step {step}, which is saved; go on with {self.onward}"
        logger.warning("%s", line)
        with interrupts.leaving(lambda: line):
            self._end(self.number)

    def _end(self, number: int) -> NoReturn:
        old = self._old.get(number)
        if callable(old):
            old(number, None)
        raise SystemExit(128 + number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on there is something to save."""
        self._stepping = True
        attendance.at(f"step {state.global_step + 1}")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where a signal came; an epoch's last step is saved after what the end of the epoch brings.

        A checkpoint between the last step and its epoch's evaluation would be resumed without that evaluation.
        """
        wanted = bool(control.should_save or self.number)
        last = bool(control.should_training_stop) or float(state.epoch or 0).is_integer()
        self._due = wanted and last
        control.should_save = wanted and not last
        self._tell(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save what the last step left to do."""
        if self._due or self.number:
            control.should_save = True
        self._due = False
        self._tell(state, control)

    def _tell(self, state: Any, control: Any) -> None:
        """Let the other processes know what comes after a step."""
        if control.should_evaluate or control.should_save:
            due = "evaluation" if control.should_evaluate else "save"
            attendance.at(f"the {due} after step {state.global_step}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything is on the disk: stop."""
        if self.number:
            self.stop(state.global_step)


@final
class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping without its demand that transformers reload the best weights: they are kept here.

    What counts is whether training still gets better. A solved start may be ahead of the first epochs and behind the
    last, whose learning rate is small; it may stay the best, and yet is no reason to stop.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        super().__init__(early_stopping_patience, early_stopping_threshold)
        self.reached: float | None = None  # by weights that took steps

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Nothing to check: `settings` has chosen the metric."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Count the evaluations that choose the best weights: of several validation sets one does."""
        if state.global_step and f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}" in metrics:
            super().on_evaluate(args, state, control, metrics, **kwargs)  # type: ignore[no-untyped-call]

    def check_metric_value(self, args: Any, state: Any, control: Any, metric_value: float) -> None:
        """Compare with what training has reached so far, and not with the start."""
        so_far = SimpleNamespace(best_metric=self.reached)
        super().check_metric_value(args, so_far, control, metric_value)  # type: ignore[no-untyped-call]
        choose = max if args.greater_is_better else min
        self.reached = metric_value if self.reached is None else choose(self.reached, metric_value)

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold."""
        found: dict[str, Any] = super().state()
        found["attributes"]["reached"] = self.reached
        return found
