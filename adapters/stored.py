"""A tensor that stays in its file: read, whole or some rows of it, where its values are asked for."""

from __future__ import annotations

import math
import os
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

    def __getitem__(self, rows: slice | list[int]) -> Tensor:
        """Some entries along the first axis, in the file's own dtype."""
        import torch

        if isinstance(rows, list):
            return torch.cat([self[row : row + 1] for row in rows]) if rows else self[0:0]
        start, stop, _ = rows.indices(self.slot.shape[0])
        entry = self.slot.shape[1:]
        width = math.prod(entry) * shards.WIDTHS[self.slot.dtype]
        raw = torch.empty(max(0, stop - start) * width, dtype=torch.uint8)
        handle = os.open(self.slot.file, os.O_RDONLY)
        try:
            shards.read_at(handle, memoryview(raw.numpy().data), self.slot.start + start * width, self.slot.file)
        finally:
            os.close(handle)
        dtype: torch.dtype = getattr(torch, self.slot.dtype)
        return raw.view(dtype).reshape(max(0, stop - start), *entry)
