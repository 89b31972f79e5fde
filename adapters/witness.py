"""Who sees a run's steps and evaluations, and writes them into its journal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, final

from transformers import TrainerCallback

from adapters.journal import Journal, memory
from adapters.throughput import Throughput

LINES = 1000  # of steps, in a run's journal at most: longer runs write the mean of several steps


@final
class Witness(TrainerCallback):
    """Writes an event for each step (of a long run: for every few), and for each evaluation."""

    def __init__(self, journal: Journal, read: Throughput) -> None:
        self._journal, self._read = journal, read
        self._losses: list[float] = []
        self._step = 0.0
        self._every = 1
        self._tokens, self._reading = 0, 0.0
        self._began = time.monotonic()

    def add(self, loss: float) -> None:
        """The share of one micro-batch in the loss of the step."""
        self._step += loss

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, or the first after a resume."""
        self._every = max(1, -(-int(state.max_steps) // LINES))
        self._losses, self._step, self._began = [], 0.0, time.monotonic()
        self._tokens, self._reading = self._read.so_far()
        if state.global_step:
            self._journal.resumed(int(state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more; its loss is the sum over its micro-batches."""
        self._losses.append(self._step)
        self._step = 0.0
        if state.global_step % self._every and state.global_step < state.max_steps:
            return
        tokens, reading = self._read.so_far()
        facts: dict[str, Any] = {
            "step": int(state.global_step),
            "epoch": round(float(state.epoch or 0.0), 4),
            "loss": sum(self._losses) / len(self._losses),
        }
        schedule = kwargs.get("lr_scheduler")
        if schedule is not None:
            facts["learning_rate"] = max(map(float, schedule.get_last_lr()))
        if tokens > self._tokens and reading > self._reading:
            facts["tokens_per_second"] = round((tokens - self._tokens) / (reading - self._reading), 1)
        now = time.monotonic()
        peaks = {name: value for name, value in memory().items() if name.startswith("peak")}
        self._journal.write("step", **facts, took=round(now - self._began, 4), **peaks)
        self._losses, self._began = [], now
        self._tokens, self._reading = tokens, reading

    def floor(self, numbers: Mapping[str, float]) -> None:
        """What an answer without a look at the input has on the validation rows."""
        self._journal.write("floor", part="validation", numbers=numbers)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """Validation rows were measured; their time is no step's."""
        found = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}
        found = {n: v for n, v in found.items() if isinstance(v, int | float) and n not in ("epoch", "loss_only")}
        took = found.pop("runtime", None)
        numbers = {n: v for n, v in found.items() if not n.endswith(("_per_second",))}
        self._journal.write(
            "evaluation",
            part="validation",
            step=int(state.global_step),
            epoch=round(float(state.epoch or 0.0), 4),
            took=took,
            numbers=numbers,
        )
        self._began = time.monotonic()
