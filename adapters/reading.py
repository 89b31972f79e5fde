"""Where a head reads: how the hidden states of a row become one, and above how many blocks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final, final

from adapters.errors import message, nearest

OWN: Final = "own"  # the model class's own reading
POOLINGS: Final = (OWN, "first", "mean", "last")
OF_PICTURES: Final = (OWN, "first", "mean")  # the last patch of a picture stands for nothing


@final
@dataclass(frozen=True)
class Reading:
    """Where a head reads.

    Attributes:
        pooling: "own", or of the places of a row that are no padding (for pictures: of the class token, where there
            is one, and all patches) the "first", the "mean" or the "last".
        layer: how many blocks run below the head; None for all.
    """

    pooling: str = OWN
    layer: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the model class reads there by itself, a checkpoint with so many blocks at least."""
        return self.pooling == OWN

    @property
    def elsewhere(self) -> bool:
        """Whether anything about the model is to be changed."""
        return not self.plain or self.layer is not None

    def __str__(self) -> str:
        parts = [] if self.plain else [f"the {self.pooling} hidden state"]
        parts += [] if self.layer is None else [f"block {self.layer}"]
        return " of ".join(parts) or "the model class's own place"


def of(task: Any) -> Reading:
    """The reading that a task asks for; tasks without such options read as the model class does."""
    known = {entry.name for entry in dataclasses.fields(task)}
    pooling = task.pooling if "pooling" in known else None
    return Reading(pooling or OWN, task.layer if "layer" in known else None)


def described(task: Any) -> str:
    """The end of a line about a task: where its head reads; empty for the class's own place."""
    read = of(task)
    return f", reads {read}" if read.elsewhere else ""


def faults(pooling: Any, layer: Any, known: tuple[str, ...] = POOLINGS) -> list[str]:
    """What is wrong with the options `pooling` and `layer`; empty for nothing."""
    found = []
    if pooling is not None and pooling not in known:
        remedy = nearest(str(pooling), known)
        found.append(message(f"unknown pooling {pooling!r}", where="pooling", expected=", ".join(known), remedy=remedy))
    if layer is not None and (isinstance(layer, bool) or not isinstance(layer, int) or layer < 1):
        found.append(message("a wrong number of blocks", where="layer", expected="1 to all of them", found=repr(layer)))
    return found
