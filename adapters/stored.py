"""A tensor that stays in its file, or in several places there: read, whole or in part, where it is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from adapters import shards
from adapters.shards import Slot

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@final
@dataclass(frozen=True)
class Stored:
    """What an edit reads its new values from, in the place of a tensor in memory.

    Whoever makes one has looked at the values; that the file stays as it is has to be seen to afterwards.

    Attributes:
        slot: where the tensor lies.
    """

    slot: Slot

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        import torch

        return torch.Size(self.slot.shape)

    def float(self) -> Tensor:
        """All of it, float32."""
        return shards.read_tensor(self.slot).float()

    def part(self, start: int, stop: int) -> Tensor:
        """Some entries along the first axis, in their own dtype."""
        found = self[start:stop]
        assert isinstance(found, Stored)
        return shards.read_tensor(found.slot)

    def __getitem__(self, rows: slice | list[int]) -> Stored | Tensor:
        """Some entries along the first axis: of a slice where they lie, of single ones their values."""
        import torch

        if isinstance(rows, list):
            parts = [self[row : row + 1].float() for row in rows]
            return torch.cat(parts) if parts else torch.empty((0, *self.slot.shape[1:]))
        start, stop, _ = rows.indices(self.slot.shape[0])
        entry = self.slot.shape[1:]
        width = math.prod(entry) * shards.WIDTHS[self.slot.dtype]
        count = max(0, stop - start)
        begin = self.slot.start + start * width
        return Stored(Slot(self.slot.file, self.slot.dtype, (count, *entry), begin, count * width))

    def entry(self, index: int) -> Stored:
        """One entry along the first axis, without that axis."""
        found = self[index : index + 1]
        assert isinstance(found, Stored)
        slot = found.slot
        return Stored(Slot(slot.file, slot.dtype, slot.shape[1:], slot.start, slot.nbytes))


@final
@dataclass(frozen=True)
class Stacked:
    """A tensor of three axes whose matrices lie apart in their files, each in one piece or in several (experts).

    Attributes:
        size: its shape.
        pieces: matrix, first row, and where the piece lies, in the order of the rows.
    """

    size: tuple[int, int, int]
    pieces: tuple[tuple[int, int, Slot], ...]

    @property
    def shape(self) -> torch.Size:
        """Of the whole tensor."""
        import torch

        return torch.Size(self.size)

    def read(self) -> Tensor:
        """All of it, in its own dtype."""
        import torch

        return torch.stack([self.matrix(entry) for entry in range(self.size[0])])

    def float(self) -> Tensor:
        """All of it, float32."""
        return self.read().float()

    def matrix(self, entry: int) -> Tensor:
        """One of the matrices, in its own dtype."""
        import torch

        return torch.cat([shards.read_tensor(slot) for place, _, slot in self.pieces if place == entry])

    def rows(self, entry: int, start: int, stop: int) -> Stored | Tensor:
        """Some rows of one matrix: where they lie, if they are a piece of their own; else their values."""
        for place, first, slot in self.pieces:
            if (place, first, first + slot.shape[0]) == (entry, start, stop):
                return Stored(slot)
        return self.matrix(entry)[start:stop]

    def __getitem__(self, rows: slice | list[int]) -> Tensor:
        """Some of the matrices, in their own dtype."""
        import torch

        entries = range(*rows.indices(self.size[0])) if isinstance(rows, slice) else rows
        return torch.stack([self.matrix(entry) for entry in entries])
