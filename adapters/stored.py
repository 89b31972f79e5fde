"""A tensor that stays in its file: read, whole or some rows of it, where its values are asked for."""

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
