"""A run's steps told to the other processes, so that they can say where one was that they wait for."""

from __future__ import annotations

from typing import Any, final

from transformers import TrainerCallback

from adapters import attendance


@final
class Whereabouts(TrainerCallback):
    """Tells at which step this process is, and what it does between two of them."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step begins."""
        attendance.at(f"step {state.global_step + 1}", state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What comes after it."""
        due = [
            name for name, wanted in (("evaluation", control.should_evaluate), ("save", control.should_save)) if wanted
        ]
        if due:
            attendance.at(f"the {' and '.join(due)} after step {state.global_step}", state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch ends, and evaluations and saves may follow."""
        attendance.at(f"the end of epoch {state.epoch or 0:g}, after step {state.global_step}", state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """No step is left."""
        attendance.at(f"the end of the run, after step {state.global_step}", state.global_step)
