"""A run told line by line: one line an evaluation, instead of printed dicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from adapters import throughput


class _Lines(TrainerCallback):
    """Says loss and metric after each evaluation."""

    def __init__(self, say: Callable[[str], None], *, by_steps: bool) -> None:
        self._say, self._by_steps = say, by_steps

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        name = str(args.metric_for_best_model).removeprefix("eval_")
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        trained = f"train loss {losses[-1]:.4f}, " if losses else ""
        chosen = metrics.get(f"eval_{name}")
        shown = f", {name} {chosen:.4f}" if chosen is not None and name != "loss" else ""
        epoch = f"epoch {state.epoch:g} of {state.num_train_epochs}"
        if self._by_steps:
            epoch = f"step {state.global_step} of {state.max_steps}"
        read = throughput.said(next((entry for entry in reversed(state.log_history) if "loss" in entry), {}))
        self._say(
            f"{epoch}: {trained}validation loss {metrics['eval_loss']:.4f}{shown}" + (f"; {read}" if read else "")
        )


def narrate(trainer: Any, say: Callable[[str], None]) -> None:
    """Let a trainer say one line an evaluation.

    Args:
        trainer: before its run.
        say: takes the line.
    """
    trainer.remove_callback(PrinterCallback)
    by_steps = not hasattr(trainer.train_dataset, "__len__")  # of a stream nobody knows how long an epoch is
    trainer.add_callback(_Lines(say, by_steps=by_steps))
