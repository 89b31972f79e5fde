"""Outputs of one model beside those of another: how often the answers are the same, how far the numbers lie apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, final

import torch
from torch import Tensor

NEAR: Final = 0.1  # of the outputs' spread: numbers of a regression that lie so near count as the same answer


@final
@dataclass(frozen=True)
class Agreement:
    """How far two models' outputs agree.

    Attributes:
        agreement: share of answers that are the same.
        max_difference, mean_difference: between the outputs, absolute.
        spread: standard deviation of the first model's outputs.
        answers: that were compared.
    """

    agreement: float
    max_difference: float
    mean_difference: float
    spread: float
    answers: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def compared(wanted: Sequence[Tensor], found: Sequence[Tensor], problem: str, threshold: float) -> Agreement:
    """Two models' outputs on the same inputs.

    Args:
        wanted, found: logits, the last dimension over labels or places, in the same order.
        problem: "single-label": the greatest is the answer; "multi-label": each label is one, given from a probability
            of `threshold` on; "regression": the number, within `NEAR` of the spread.
        threshold: see there.
    """
    one = torch.cat([part.double().flatten() for part in wanted])
    other = torch.cat([part.double().flatten() for part in found])
    apart = (one - other).abs()
    spread = float(one.std(correction=0)) if one.numel() else 0.0
    if problem == "regression":
        same = apart <= NEAR * spread
    elif problem == "multi-label":
        same = (one.sigmoid() >= threshold) == (other.sigmoid() >= threshold)
    else:
        pairs = zip(wanted, found, strict=True)
        same = torch.cat([(first.argmax(-1) == second.argmax(-1)).flatten() for first, second in pairs])
    return Agreement(
        float(same.double().mean()), float(apart.max()), float(apart.mean()), spread, answers=int(same.numel())
    )
