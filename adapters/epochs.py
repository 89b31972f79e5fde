"""The epochs of a run: in which order their rows come, a function of seed and epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, final

import numpy as np
import torch
from torch.utils.data import RandomSampler, Sampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from adapters.contracts import Draw


@final
class Order(Sampler[int]):
    """The rows of an epoch, shuffled; a resumed run sees the order that an uninterrupted one would have seen.

    transformers' samplers draw from torch's global generator, whose state in the middle of an epoch is not the one
    that the epoch began with.

    Args:
        rows: how many there are.
        seed: of the order.
        epoch: whose `epoch` counts.
        lengths: of the rows, to keep rows of like length together; None for plain shuffling.
        group: rows of a step.
    """

    def __init__(self, rows: int, seed: int, epoch: Draw, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.rows, self.seed, self.epoch = rows, seed, epoch
        self.lengths, self.group = lengths, group

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        mixed = np.random.SeedSequence((self.seed, self.epoch.epoch)).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        if self.lengths is None:
            return iter(torch.randperm(self.rows, generator=generator).tolist())
        order: list[int] = get_length_grouped_indices(self.lengths, self.group, generator=generator)  # type: ignore[no-untyped-call]
        return iter(order)


@final
class Longest(Sampler[int]):
    """Rows to be evaluated, the longest first and those of one length in their own order; nothing is drawn.

    Args:
        lengths: of the rows.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.order = np.argsort(-np.asarray(lengths), kind="stable")

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order.tolist())

    def put_back(self, found: Any) -> Any:
        """Arrays with the rows first, or tuples of them, from the order of reading to the order of the rows."""
        if isinstance(found, tuple | list):
            return type(found)(self.put_back(part) for part in found)
        if not isinstance(found, np.ndarray) or len(found) != len(self.order):
            return found
        return found[np.argsort(self.order)]


def ordered(chosen: Any, args: TrainingArguments, epoch: Draw) -> Any:
    """The sampler that transformers chose, in an order of ours where its own depends on what was drawn before."""
    seed = args.data_seed if args.data_seed is not None else args.seed
    if isinstance(chosen, LengthGroupedSampler):
        return Order(len(chosen), seed, epoch, list(chosen.lengths[:]), chosen.batch_size * args.world_size)
    return Order(len(chosen), seed, epoch) if isinstance(chosen, RandomSampler) else chosen


@final
class Epochs(TrainerCallback):
    """Counts epochs, and moves what is drawn anew in each of them on, before its batches are made.

    Attributes:
        first: the epoch that a run begins or goes on with, and how many of its batches are behind us.
        batches: taken of this epoch so far.
    """

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.start(0, 0)

    def start(self, epoch: int, batches: int) -> None:
        """Where a run begins or goes on."""
        self.first = self._next = (epoch, batches)
        self.batches = batches

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count on; the epochs of a stream, whose length nobody knows, show in no other number."""
        epoch, self.batches = self._next
        self.draw.epoch = max(int(state.epoch or 0), epoch)
        self._next = (self.draw.epoch + 1, 0)
