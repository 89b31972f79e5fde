"""transformers.Trainer whose model accelerate may divide over the processes of the run (FSDP2), or offload in part."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from adapters import finite, onload, ranks, runs, sharded

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
    _undivided: bool  # each process holds the whole model: then a pass through it is its own affair

    def _say(self, remark: str) -> None:
        """A remark for the run's notes, which the first process says, once."""
        if remark not in self.remarks:
            self.remarks.append(remark)
            logger.log(logging.WARNING if ranks.first() else logging.DEBUG, remark)

    def create_accelerator_and_postprocess(self) -> None:
        """transformers' accelerator, with the engine that divides the model where that is asked for."""
        with sharded.own_engine():
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = sharded.engage(self.accelerator, self.args)
        self._undivided = not self.is_fsdp_enabled
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
        if self._undivided:
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        with sharded.ready(self.adapted, self.args.device):
            prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._training = sharded.settle(self.adapted)
        return prepared

    def _layer_at_fault(self, model: nn.Module, forward: Callable[[], object]) -> str:
        """The first layer whose output is not finite; unknown of a divided model, where no pass is for one alone."""
        return finite.first_at_fault(model, forward) if self._undivided else ""

    def _by_first(self, write: Callable[[], None]) -> None:
        """Let the first process write a checkpoint, from what all have put together where each holds a part."""
        if self._undivided:
            ranks.by_first(write)
            return
        parts = self._best
        self._moments, self._best = sharded.moments(self.optimizer), sharded.together(parts)
        try:
            with sharded.gathered(self.adapted):
                ranks.by_first(write)
        finally:
            self._moments, self._best = None, parts

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._moments is None:
            super()._save_optimizer_and_scheduler(output_dir)
        else:
            runs.write_moments(Path(output_dir), self._moments, self.lr_scheduler)
