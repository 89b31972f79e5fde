"""Which rows each process of a run takes of every step and of an evaluation: all of them once, however many there are.

The order of the rows hangs on no process. Of each stretch of it that all processes take at a time, process r of N takes
every N-th row from the r-th on, so that a step holds the same rows in one process and in many, and rows of like length
are spread evenly.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, final

import numpy as np
from torch.utils.data import Sampler


@final
class Shares(Sampler[list[int]]):
    """The batches of one process; all processes have as many.

    Where the last rows are fewer than the processes, a process without one is given another's: its batch is blank, and
    counts for nothing.

    Args:
        order: the rows, in the order of all processes.
        size: rows of a batch.
        processes: how many there are.
        rank: which of them this is.
    """

    batch_size = None  # accelerate reads it: batches come as they are
    drop_last = False

    def __init__(self, order: Any, size: int, processes: int, rank: int) -> None:
        self.order, self.size, self.processes, self.rank = order, size, processes, rank

    def __len__(self) -> int:
        return -(-len(self.order) // (self.size * self.processes))

    def __iter__(self) -> Iterator[list[int]]:
        rows = iter(self.order)
        while stretch := list(itertools.islice(rows, self.size * self.processes)):
            yield stretch[self.rank :: self.processes] or stretch[:1]

    def blank(self, batch: int) -> bool:
        """Whether this process has no row of its own in its batch of that number."""
        return len(self.order) - batch * self.size * self.processes <= self.rank

    def rows(self, rank: int) -> int:
        """How many rows of its own a process has in all."""
        return -(-(len(self.order) - rank) // self.processes) if rank < len(self.order) else 0

    def joined(self, parts: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """What the processes have found of their rows, in the order of all rows.

        Args:
            parts: by process; an entry a row, those of blank batches behind.
        """
        whole: np.ndarray[Any, Any] | None = None
        for rank, part in enumerate(parts):
            if whole is None:
                whole = np.empty((len(self.order), *part.shape[1:]), dtype=part.dtype)
            whole[rank :: self.processes] = part[: self.rows(rank)]
        assert whole is not None
        return whole


def divided(loader: Any, order: Any, size: int, processes: int, rank: int) -> Shares:
    """Let a loader that accelerate has prepared give the batches of `Shares`, in place of its own division.

    accelerate gives whole batches in turn and makes up the last ones of rows that were there already.
    transformers passes its own rank-aware sampler through in the same way.
    """
    shares = Shares(order, size, processes, rank)
    wrapped = loader.batch_sampler
    wrapped.batch_sampler, wrapped.batch_size, wrapped.drop_last = shares, None, False
    wrapped.num_processes, wrapped.process_index = 1, 0
    return shares
