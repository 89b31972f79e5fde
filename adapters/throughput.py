"""How fast a run reads: tokens a second, and how much of what it computes is padding."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from transformers import TrainerCallback

COUNTED = "counted"  # what a batch carries its tally as, until the trainer takes it out


@final
@dataclass(frozen=True)
class Tally:
    """Tokens of one batch or many, and the places that they were computed in, padding included."""

    tokens: int = 0
    places: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.tokens + other.tokens, self.places + other.places)

    @property
    def padding(self) -> float:
        """The share of places that hold no token."""
        return 1 - self.tokens / self.places if self.places else 0.0


def tally(batch: Mapping[str, Any], rows: Sequence[Any]) -> Tally:
    """What a batch on the CPU holds, encoder and decoder together; nothing where there are no tokens (pictures).

    Args:
        batch: as collated.
        rows: that it was made of.
    """
    ids = batch.get("input_ids")
    if ids is None:
        return Tally()
    mask = batch.get("attention_mask")
    if mask is not None:
        found = Tally(int(mask.sum()), ids.numel())
    else:  # packed rows have no mask; what fills them up is no row's
        found = Tally(sum(len(row["input_ids"]) for row in rows), ids.numel())
    if "decoder_input_ids" in batch and "labels" in batch:
        labels = batch["labels"]
        found += Tally(int((labels != -100).sum()), labels.numel())
    return found


def counted(collate: Callable[[Sequence[Any]], dict[str, Any]], rows: Sequence[Any]) -> dict[str, Any]:
    """A batch with its tally, counted where it is made: on the CPU, before it goes to a device."""
    batch = collate(rows)
    if isinstance(batch, Mapping):
        return {**batch, COUNTED: tally(batch, rows)}
    return batch


def taken(batches: Sequence[Any]) -> Tally:
    """The tallies of batches in one, which they hold no more."""
    return sum((batch.pop(COUNTED, Tally()) for batch in batches if isinstance(batch, dict)), Tally())


@final
class Throughput(TrainerCallback):
    """Sums up what the steps of a run read, and their time: evaluations and checkpoints between them do not count."""

    def __init__(self) -> None:
        self.start()

    def start(self, whole: Sequence[float] = (0, 0, 0.0), lately: Sequence[float] = (0, 0, 0.0)) -> None:
        """Where a run begins or goes on: tokens, places, seconds, up to the last log and since then."""
        self._whole, self._seconds = Tally(int(whole[0]), int(whole[1])), float(whole[2])
        self._lately, self._since = Tally(int(lately[0]), int(lately[1])), float(lately[2])
        self._began: float | None = None

    def begin(self) -> None:
        """The batches of a step are about to be made."""
        self._began = time.perf_counter()

    def take(self, batches: Sequence[Any]) -> None:
        """The batches of a step, whose tallies are taken out."""
        self.add(taken(batches))

    def add(self, found: Tally) -> None:
        """What a step has read."""
        self._lately += found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step is over."""
        if self._began is not None:
            self._since += time.perf_counter() - self._began
        self._began = None

    def lately(self) -> dict[str, float]:
        """Tokens a second and padding since the last time; nothing for what has no tokens."""
        numbers = _numbers(self._lately, self._since)
        self._whole, self._seconds = self._whole + self._lately, self._seconds + self._since
        self._lately, self._since = Tally(), 0.0
        return numbers

    def totals(self) -> dict[str, float]:
        """Tokens, tokens a second and padding of the whole run; nothing for what has no tokens."""
        whole = self._whole + self._lately
        numbers = _numbers(whole, self._seconds + self._since)
        return {"tokens": whole.tokens, **numbers} if numbers else {}

    def so_far(self) -> tuple[int, float]:
        """Tokens of the whole run up to now, and the seconds that they were read in."""
        return (self._whole + self._lately).tokens, self._seconds + self._since

    def place(self) -> list[list[float]]:
        """What `start` takes to go on from here."""
        counted = ((self._whole, self._seconds), (self._lately, self._since))
        return [[one.tokens, one.places, round(seconds, 3)] for one, seconds in counted]


def _numbers(found: Tally, seconds: float) -> dict[str, float]:
    if not found.places:
        return {}
    return {"tokens_per_second": round(found.tokens / max(seconds, 1e-9), 1), "padding": round(found.padding, 4)}


def said(numbers: Mapping[str, float]) -> str:
    """The same in words; empty where nothing was counted."""
    if "tokens_per_second" not in numbers:
        return ""
    return f"{numbers['tokens_per_second']:,.0f} tokens/s, {100 * numbers.get('padding', 0.0):.0f} % padding"
