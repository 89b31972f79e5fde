"""transformers.Trainer whose model accelerate may divide over the processes of the run (FSDP2), or offload in part."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from adapters import finite, onload, processes, ranks, runs, sharded, zero
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from adapters.contracts import Adapted

logger = logging.getLogger(__name__)


class DividedTrainer(transformers.Trainer):
    """What is different where each process holds a part of the model; where it holds all of it nothing is."""

    adapted: Adapted
    remarks: list[str]  # for the run's notes
    _best: dict[str, Tensor] | None = None  # the best weights so far
    _moments: Mapping[str, Any] | None = None  # the optimizer's state put together, while a checkpoint is written
    _training: dict[str, Any]
    _batch_rows: list[int] | None  # of the pass at hand
    _own: dict[str, Any]  # our own settings beside transformers'
    _zero: zero.Zero | None = None  # DeepSpeed's engine, while the run goes on
    _stepped_on: bool = False  # DeepSpeed has
    _haste: float = 1.0  # times the learning rate
    _undivided: bool  # each process holds the whole model: then a pass forward through it is its own affair
    _apart: bool  # and so is the one back

    def _say(self, remark: str) -> None:
        """A remark for the run's notes, which the first process says, once."""
        if remark not in self.remarks:
            self.remarks.append(remark)
            logger.log(logging.WARNING if ranks.first() else logging.DEBUG, remark)

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' accelerator, with the engine that divides the model where that is asked for."""
        zero.tell_device()
        kept = os.environ.get(sharded.USE)  # accelerate sets it where a run asks for FSDP, and leaves it set
        with processes.saying(sharded.USE, kept), processes.saying(processes.ZERO, None):
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = sharded.engage(self.accelerator, self.args)
        self._undivided = not self.is_fsdp_enabled
        self._apart = self._undivided and self._own.get("deepspeed") is None
        if self._undivided and not self._apart:
            zero.refuse(self.adapted, self.args, self.accelerator.mixed_precision)
        if self._undivided and onload.placed(self.adapted.model) is not None:
            onload.move(self.adapted.model, self.args.device)
        if not self._undivided:
            sharded.refuse(self.adapted, self.accelerator.mixed_precision)
            self._say(sharded.WITHOUT)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """transformers' move; what is offloaded stays where it lies."""
        if onload.placed(model) is None:
            super()._move_model_to_device(model, device)
        else:
            onload.move(model, device)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' preparation; the parameters of a model that is divided are others afterwards."""
        if self._apart:
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        if self._undivided:
            if self._stepped_on and (args[2] if len(args) > 2 else kwargs["resume_from_checkpoint"]) is None:
                raise RequestError(
                    message(
                        "a second run of one Trainer would go on with the moments of the first, which are gone",
                        where="train, args: deepspeed",
                        remedy="Make a new Trainer, or go on from a checkpoint: resume_from_checkpoint.",
                    )
                )
            self._stepped_on = True
            self._zero = zero.Zero(self._own["deepspeed"], self.args.max_grad_norm or 0.0, self._training)
            with self._zero.preparing(self.accelerator):
                return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        with sharded.ready(self.adapted, self.args.device):
            prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._training = sharded.settle(self.adapted)
        return prepared

    def _layer_at_fault(self, forward: Callable[[], object]) -> str:
        """The first layer whose output is not finite; unknown of a divided model, where no pass is for one alone."""
        return finite.first_at_fault(self.adapted.model, forward) if self._undivided else ""

    def _by_first(self, write: Callable[[], None]) -> None:
        """Let the first process write a checkpoint, from what all have put together where each holds a part."""
        if self._apart:
            ranks.by_first(write)
            return
        parts, found = self._best, self._zero
        self._moments = sharded.moments(self.optimizer) if found is None else found.pieces.moments()
        self._best = sharded.together(parts)
        try:
            with sharded.gathered(self.adapted):
                ranks.by_first(write)
        finally:
            self._moments, self._best = None, parts

    def _take_moments(self, state: Mapping[str, Any]) -> None:
        """Give the optimizer a state that was saved whole, each process its part where it is divided."""
        if self._zero is not None:
            self._zero.pieces.load(state)
        else:
            sharded.load_moments(self.optimizer, state)

    def _check_gradients(self) -> None:
        """Look at the gradients of a step before it is taken; `NumbersError` where one is not finite."""
        if getattr(self.accelerator, "scaler", None) is not None:
            return  # a loss scale is still being found
        if self._zero is not None:
            self._zero.check_gradients(self._where())
        else:
            held = {name: p.grad for name, p in self._training.items() if p.grad is not None}
            finite.check_gradients(held, self._where())

    def _where(self) -> str:
        """Where in the run a fault is: step, epoch and rows."""
        rows = f", rows {', '.join(map(str, self._batch_rows[:16]))}" if self._batch_rows else ""
        return f"step {self.state.global_step + 1}, epoch {self.state.epoch or 0:.2f}{rows}"

    def _let_go(self) -> None:
        """Take off the model what only a run has on it."""
        if self._zero is not None:
            self.optimizer = self.callback_handler.optimizer = self._zero.close(self.accelerator)
            self.model_wrapped = self.adapted.model
        self._zero = None

    def _sending(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a pass of this process: whatever becomes of it, no other waits in vain for what it sends."""
        if self._zero is not None:
            return self._zero.passing(last)
        return self.accelerator.no_sync(self.model_wrapped) if self._apart else contextlib.nullcontext()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._moments is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            runs.write_moments(Path(output_dir), self._moments, self.lr_scheduler)
