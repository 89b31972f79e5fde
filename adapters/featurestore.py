"""Features of a head that outlive the run: on disk by row, under all that they were computed by; or in memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from adapters import kept, pooling, principal, reading, solve
from adapters.anatomy import is_tuner_layer, owner
from adapters.contracts import Adapted
from adapters.edits import AddLowRank
from adapters.reading import OWN, Reading
from adapters.states import States

if TYPE_CHECKING:
    from torch import nn

Features = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]  # and labels; of training and validation rows


@final
@dataclass
class Known:
    """What runs over the same rows need not find out again.

    Attributes:
        keeps: features and solutions stay in memory for the next run; else nothing does.
        solutions: what layers were solved to, by everything that decides it.
        read: the features of training and validation rows that were read last, with labels; before them what they are
            those of. None in their place: they are not finite.
        names: what rows are known by, see `kept.Request`.
        turns: of the features of training rows that were solved on last.
    """

    keeps: bool = False
    solutions: dict[tuple[Hashable, ...], solve.Choice] = field(default_factory=dict)
    read: tuple[Hashable, Features | None] | None = None
    names: kept.Names = field(default_factory=dict)
    turns: principal.Turns | None = None

    def features(self, of: tuple[Hashable, ...], reading: Callable[[], Features | None]) -> Features | None:
        """The features of some rows, read unless they are those of the last time.

        Args:
            of: the folder that is named after all that computes them, None where it cannot be named; the sets of
                training and of validation rows, and what chooses among them.
            reading: reads them; None where they are not finite.
        """
        if not self.keeps or of[0] is None:
            return reading()
        if self.read is None or self.read[0] != of:
            self.read = of, reading()
        return self.read[1]

    def turned(self, features: Tensor) -> principal.Turns | None:
        """What was made of the features of training rows for another loss; None where nothing is kept."""
        if self.keeps and (self.turns is None or self.turns.features is not features):
            self.turns = principal.Turns(features)
        return self.turns

    def choice(
        self, of: tuple[Hashable, ...], terms: Sequence[Any], solving: Callable[[], solve.Choice]
    ) -> solve.Choice:
        """What a layer is solved to on features, solved unless it was.

        Args:
            of: the features, as `features` takes it.
            terms: what else decides it, by `repr`: a task is a dataclass, whose fields decide its loss.
            solving: solves it.
        """
        if not self.keeps or of[0] is None:
            return solving()
        key = (*of, repr(terms))
        if key not in self.solutions:
            self.solutions[key] = solving()
        return self.solutions[key]


def opened(
    adapted: Adapted,
    layer: nn.Linear,
    readings: tuple[Reading, ...],
    device: torch.device,
    cache: Mapping[str, Any],
) -> States:
    """What is kept of the rows' features; in memory where adapters change them, which are new in each run.

    Args:
        adapted: as `adapt` left it.
        layer: its output layer, which makes no feature.
        readings: of the features, in their order.
        device: where the model computes.
        cache: whose features, and how many of them on disk (see `kept.opened`); empty to keep none.
    """
    if not cache:
        return States(None, 0)
    path = next(path for path, module in adapted.model.named_modules() if module is layer)
    # What the live model's own place is, its task says: the same name stands for other features there.
    placed = reading.of(adapted.record.task or adapted.task)
    places = " ".join(f"{one.pooling}@{one.layer}" for one in (placed, *readings))
    return kept.opened(
        adapted.model,
        path,
        dtype=torch.float32,
        device=device,
        more=f"features {places}",
        apart={path, *map(owner, _unread(adapted, readings))},
        silent=_silent(adapted),
        **cache,
    )


def _unread(adapted: Adapted, readings: tuple[Reading, ...]) -> frozenset[str]:
    """The parameters that none of the readings uses: a pooler or a dense layer of the head, which may be new."""
    if any(one.pooling == OWN for one in readings):
        return frozenset(adapted.record.unread)
    return pooling.planned(adapted.model, readings[0]).unread


def _silent(adapted: Adapted) -> set[str]:
    """The modules whose adapters change nothing yet, as those of LoRA at its start."""
    if not any(map(is_tuner_layer, adapted.model.modules())):
        return set()
    edits = adapted.strategy.edits(adapted.state())
    return {owner(name) for name, edit in edits.items() if isinstance(edit, AddLowRank) and edit.nothing}
