"""One evaluation of a run: the rows that each process passes through the model, and what all of them found together.

A pass holds no exchange: what stops one process waits until all have passed their rows, and then stops all, by its
class and words. Of a divided model every pass is one, and so is what stops it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, final

from adapters import exchange
from adapters.epochs import Longest
from adapters.ranks import gathered
from adapters.shares import Shares


@final
class Evaluation:
    """Every row counts once, however many processes there are.

    Args:
        loader: of this process' batches.
    """

    def __init__(self, loader: Any) -> None:
        self.rows = loader.dataset
        batches = getattr(loader, "batch_sampler", None)
        inner = getattr(batches, "batch_sampler", None)
        self.shares: Shares | None = inner if isinstance(inner, Shares) else None
        order = self.shares.order if self.shares is not None else getattr(batches, "sampler", None)
        self._read_in = order if isinstance(order, Longest) else None
        self._batches = 0
        self._apart = False  # the processes pass their rows, each for itself, and have not met since
        self._total, self._items = 0.0, 0

    @contextlib.contextmanager
    def passing(self, trainer: Any, *, apart: bool) -> Iterator[None]:
        """Within it the processes pass their rows; they meet behind the last, or where what they found is asked for.

        Args:
            trainer: of the run, which would put together after each pass what `whole` puts together once.
            apart: every process has the whole model.

        Raises:
            Exception: as `exchange.stop_all` has it.
        """
        accelerator = trainer.accelerator
        self._apart = apart and self.shares is not None
        if self.shares is not None:
            trainer.gather_function = _kept
        if self._apart:
            accelerator.pad_across_processes = _kept
        try:
            yield
            self.meet()
        except Exception as fault:
            self.meet(fault)
            raise
        finally:
            vars(accelerator).pop("pad_across_processes", None)

    def meet(self, fault: Exception | None = None) -> None:
        """Once all have passed their rows: what stopped one of them stops all, as `exchange.stop_all` has it."""
        if self._apart:
            self._apart = False
            exchange.stop_all(fault)

    def batch(self) -> bool:
        """One batch more; whether it counts: a process without a row of its own is given another's."""
        blank = self.shares is not None and self.shares.blank(self._batches)
        self._batches += 1
        return not blank

    def add(self, loss: float, items: int) -> None:
        """The mean loss of a batch, and over how many items it is one."""
        self._total, self._items = self._total + loss * items, self._items + items

    def loss(self) -> float | None:
        """The mean over the items of all processes; None where none were counted."""
        self.meet()
        total, items = (sum(part) for part in zip(*gathered([self._total, self._items]), strict=True))
        return total / items if items else None

    def whole(self, found: Any) -> Any:
        """What all processes have found, in the order of reading: arrays with the rows first, or tuples of them."""
        if isinstance(found, tuple | list):
            return type(found)(self.whole(part) for part in found)
        if self.shares is None or found is None:
            return found
        self.meet()
        return self.shares.joined(exchange.arrays(found))

    def put_back(self, found: Any) -> Any:
        """The same in the order of the rows."""
        whole = self.whole(found)
        return whole if self._read_in is None else self._read_in.put_back(whole)


def _kept(found: Any, **how: Any) -> Any:
    """In place of transformers' gathering after each batch: what a process has found stays there until the end."""
    return found
