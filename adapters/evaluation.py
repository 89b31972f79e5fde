"""One evaluation of a run: the rows that each process passes through the model, and what all of them found together."""

from __future__ import annotations

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
        self._total, self._items = 0.0, 0

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
        total, items = (sum(part) for part in zip(*gathered([self._total, self._items]), strict=True))
        return total / items if items else None

    def whole(self, found: Any) -> Any:
        """What all processes have found, in the order of reading: arrays with the rows first, or tuples of them."""
        if isinstance(found, tuple | list):
            return type(found)(self.whole(part) for part in found)
        if self.shares is None or found is None:
            return found
        return self.shares.joined(exchange.arrays(found))

    def put_back(self, found: Any) -> Any:
        """The same in the order of the rows."""
        whole = self.whole(found)
        return whole if self._read_in is None else self._read_in.put_back(whole)


def kept(found: Any) -> Any:
    """In place of transformers' gathering after each batch: what a process has found stays there until the end."""
    return found
