"""How much memory is free, and a batch divided along its rows where it does not suffice for all of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch

CPU_TEXT = "can't allocate memory"  # torch's CPU allocator has no exception of its own


def free_memory(device: torch.device | None = None) -> int:
    """Bytes that could still be taken on a device; None for the CPU."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def ran_out(fault: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    return isinstance(fault, torch.OutOfMemoryError) or (isinstance(fault, RuntimeError) and CPU_TEXT in str(fault))


def rows_of(batch: Mapping[str, Any]) -> int:
    """Rows of a batch, by its labels."""
    return len(batch["labels"]) if "labels" in batch else 1


def divided(batch: Mapping[str, Any], most: int | None) -> list[dict[str, Any]]:
    """The batch in parts of at most `most` rows; what does not follow the rows goes to every part.

    Args:
        batch: model inputs with "labels"; without them it stays whole.
        most: rows of a part, None for all.
    """
    rows = rows_of(batch)
    if most is None or rows <= most:
        return [dict(batch)]

    def part(value: Any, begin: int) -> Any:
        by_rows = (isinstance(value, torch.Tensor) and value.dim() > 0) or isinstance(value, Sequence)
        return value[begin : begin + most] if by_rows and len(value) == rows else value

    return [{name: part(value, begin) for name, value in batch.items()} for begin in range(0, rows, most)]


def release() -> None:
    """Give back what a broken-off pass holds."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@final
class Portions:
    """How many rows are passed through a model at once: all of a batch, until memory runs out.

    Half as many from then on, in twice as many passes, whose gradients add up. The optimizer step in progress begins
    anew, because a backward pass that broke off leaves a part of its gradients behind; so the global batch and its
    gradient stay what they were, but for what dropout draws.
    """

    def __init__(self) -> None:
        self._most: int | None = None
        self._window: list[Any] = []  # batches of the optimizer step in progress

    def passed(
        self,
        batch: Mapping[str, Any],
        act: Callable[[dict[str, Any]], torch.Tensor],
        forget: Callable[[], None],
        say: Callable[[int, int], None],
        *,
        divide: bool,
    ) -> torch.Tensor:
        """The loss of a batch, summed over its parts.

        Args:
            batch: one micro-batch.
            act: forward and backward pass; gives the part's share in the loss of the global batch.
            forget: sets all gradients to nothing.
            say: takes the rows at which memory ran out, and those from here on.
            divide: False lets the exception through.

        Raises:
            torch.OutOfMemoryError, RuntimeError: one row alone does not fit.
        """
        self._window.append(batch)
        again: list[Any] = []
        while True:
            try:
                for earlier in again:
                    self._in_parts(earlier, act)
                return self._in_parts(batch, act)
            except RuntimeError as fault:
                largest = max(map(rows_of, self._window))
                rows = min(largest, self._most or largest)
                if not ran_out(fault) or rows < 2 or not divide:
                    raise
            self._most, again = -(-rows // 2), self._window[:-1]
            forget()
            release()
            say(rows, self._most)

    def _in_parts(self, batch: Mapping[str, Any], act: Callable[[dict[str, Any]], torch.Tensor]) -> torch.Tensor:
        losses = [act(part) for part in divided(batch, self._most)]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def step_done(self) -> None:
        """The optimizer takes its step: what was passed through counts."""
        self._window = []
