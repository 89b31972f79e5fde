"""What a run shows while it goes on: steps done, loss, metric, tokens a second, padding; and its evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from transformers import TrainerCallback

from adapters.progress import Job
from adapters.throughput import Throughput, said


@final
class Gauge(TrainerCallback):
    """In place of transformers' own bars: one job for the steps, and in it one for each evaluation.

    Args:
        throughput: of the run.
        loss: the loss of the last steps; None before the first.
    """

    def __init__(self, throughput: Throughput, loss: Callable[[], float | None]) -> None:
        self._throughput, self._loss = throughput, loss
        self._training: Job | None = None
        self._evaluating: Job | None = None
        self._metric = ""

    def close(self) -> None:
        """However the run ended, nothing of it is shown any more."""
        for job in (self._evaluating, self._training):
            if job is not None:
                job.close(whole=False)
        self._training = self._evaluating = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Steps begin; a run that is solved has none."""
        self.close()
        self._metric = ""
        if state.is_world_process_zero and state.max_steps > 0:
            self._training = Job("training", state.max_steps, "steps", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step more."""
        if self._training is not None:
            loss = self._loss()
            parts = [f"loss {loss:.4f}" if loss is not None else "", self._metric, said(self._throughput.totals())]
            self._training.note = ", ".join(filter(None, parts))
            self._training.to(state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """A batch of an evaluation more."""
        if not state.is_world_process_zero:
            return
        if self._evaluating is None:
            try:
                total = len(eval_dataloader)
            except TypeError:  # rows that come one by one
                total = None
            self._evaluating = Job("evaluating", total, "batches")
        self._evaluating.advance()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """An evaluation is over; its metric stands beside the loss from here on."""
        self._evaluated(str(args.metric_for_best_model or "loss"), metrics or {})

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Predictions are over."""
        self._evaluated("", {})

    def _evaluated(self, name: str, metrics: Mapping[str, float]) -> None:
        if self._evaluating is not None:
            self._evaluating.close()
        self._evaluating = None
        name = name.removeprefix("eval_")
        value = metrics.get(f"eval_{name}")
        if isinstance(value, int | float):
            self._metric = f"validation {name} {value:.4f}"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The last step is done."""
        if self._training is not None:
            self._training.close()
        self._training = None
