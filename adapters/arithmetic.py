"""The arithmetic of deltas: several changes of one tensor made into one, by the methods of the literature.

A delta is what training added to a tensor, in the tensor's own layout, float32. Every method takes the deltas of one
tensor with their weights and gives one; none of them knows what made a delta.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, final

import torch
from torch import Tensor

from adapters.edits import Edit, by_rows
from adapters.errors import RequestError, message

SPREAD: Final = 0.1  # DELLA's epsilon: how far the chance to stay lies apart between the smallest and largest of a row


@final
@dataclass(frozen=True)
class Term:
    """One adapter's part in one tensor.

    Attributes:
        weight: of the adapter, the scale in it.
        delta: what it added to the tensor.
        seed: of whatever is drawn for it.
    """

    weight: float
    delta: Tensor
    seed: int


def seeded(seed: int, *names: str) -> int:
    """A seed that hangs on what is drawn for, not on the order in which it is drawn."""
    return int.from_bytes(hashlib.sha256("\0".join([str(seed), *names]).encode()).digest()[:7], "big")


def trim(delta: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, in this share of all; zero for the others (Yadav et al., 2023, step 1)."""
    kept = max(1, round(density * delta.numel()))
    if kept >= delta.numel():
        return delta
    order = delta.abs().flatten().argsort(descending=True, stable=True)  # of equals the first: always the same ones
    result = torch.zeros_like(delta).flatten()
    result[order[:kept]] = delta.flatten()[order[:kept]]
    return result.view_as(delta)


def drop(delta: Tensor, density: float, seed: int) -> Tensor:
    """Each entry stays with this chance and is divided by it, so that the expectation stays (Yu et al., 2024)."""
    if density >= 1:
        return delta
    return torch.where(_drawn(delta, seed) < density, delta / density, torch.zeros_like(delta))


def drop_by_magnitude(delta: Tensor, density: float, seed: int) -> Tensor:
    """The same with a chance that grows with the magnitude's rank in its row, `density` on average (Deep et al., 2024).

    A row is the last axis of the tensor's own layout. The chances of a row lie evenly within `SPREAD`, or nearer
    together where they would leave 0 to 1.
    """
    if density >= 1:
        return delta
    spread = min(SPREAD, 2 * density, 2 * (1 - density)) * (1 - 1e-6)
    size = delta.shape[-1]
    ranks = delta.abs().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).double()
    chance = density + spread * (ranks / (size - 1) - 0.5 if size > 1 else torch.zeros_like(ranks))
    kept = _drawn(delta, seed) < chance
    return torch.where(kept, delta / chance.to(delta.dtype), torch.zeros_like(delta))


def _drawn(like: Tensor, seed: int) -> Tensor:
    """Numbers between 0 and 1, evenly; the global generator is left alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(like.shape, generator=generator, dtype=torch.float64)


def added(terms: Sequence[Term], total: float) -> Tensor:
    """The weighted sum."""
    result = terms[0].weight * terms[0].delta
    for term in terms[1:]:
        result += term.weight * term.delta
    return result


def elected(terms: Sequence[Term], total: float) -> Tensor:
    """The mean of those that agree with the sign of the weighted sum, entry by entry (Yadav et al., 2023, 2 and 3).

    The mean is weighted by the weights' magnitudes and multiplied by `total`: with weights that sum to 1 it is the
    paper's; where all adapters changed an entry in one direction it is the weighted sum.
    """
    sign = added(terms, total).sign()
    result, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for term in terms:
        part = term.weight * term.delta
        agrees = (part.sign() == sign) & (sign != 0)
        result += torch.where(agrees, part, torch.zeros_like(part))
        share += abs(term.weight) * agrees
    return result * (total / share.clamp(min=torch.finfo(share.dtype).tiny))


@final
@dataclass(frozen=True)
class Method:
    """How the deltas of one tensor become one.

    Attributes:
        source: the paper, or what it is.
        thins: takes a delta, a density and a seed, and leaves entries out; None where all stay.
        joins: takes what is left, and the sum of the magnitudes of all adapters' weights.
        density: of the entries that stay, where none is asked for.
        cuts: the result has to be brought to a rank.
        single: takes one adapter.
        draws: which entries stay hangs on a seed.
    """

    source: str
    thins: Callable[[Tensor, float, int], Tensor] | None = None
    joins: Callable[[Sequence[Term], float], Tensor] = added
    density: float = 1.0
    cuts: bool = False
    single: bool = False
    draws: bool = False

    @property
    def sums(self) -> bool:
        """Whether it is a weighted sum, which may stay factors."""
        return self.thins is None and self.joins is added

    def __call__(self, terms: Sequence[Term], density: float, total: float) -> Tensor:
        """One delta of several.

        Args:
            terms: of the adapters that changed the tensor.
            density: share of the entries that stay.
            total: the magnitudes of all adapters' weights, summed.
        """
        thins = self.thins
        if thins is not None:
            terms = [Term(term.weight, thins(term.delta, density, term.seed), term.seed) for term in terms]
        return self.joins(terms, total)


METHODS: Final[Mapping[str, Method]] = {
    "linear": Method("the weighted sum of what the adapters did"),
    "cat": Method("the same, by the name that it has where factors are put side by side"),
    "svd": Method("the weighted sum, cut to a rank (Eckart and Young, 1936)", cuts=True),
    "ties": Method("Yadav et al., 2023", lambda delta, density, seed: trim(delta, density), elected, 0.2),
    "dare": Method("Yu et al., 2024", drop, density=0.5, draws=True),
    "della": Method("Deep et al., 2024", drop_by_magnitude, elected, 0.5, draws=True),
    "task-arithmetic": Method("Ilharco et al., 2023: the weighted sum of task vectors, times a scale"),
    "negate": Method("Ilharco et al., 2023: one task vector, taken away", single=True),
}


@final
@dataclass(frozen=True)
class Matrix:
    """Rows of one matrix of a stack that a method takes as a tensor of its own: an expert's.

    Attributes:
        entry: which of the stack's matrices.
        start, stop: its rows.
        name: what is drawn for it hangs on this, wherever it lies.
    """

    entry: int
    start: int
    stop: int
    name: str

    def of(self, stack: Tensor) -> Tensor:
        """Its values, where they lie in the stack."""
        return stack[self.entry, self.start : self.stop]


@final
@dataclass(frozen=True)
class Fused:
    """old + what a method makes of several edits' deltas; a `Blend` for the methods that are no sums.

    Attributes:
        method: how.
        density: share of the entries that stay.
        total: the magnitudes of all adapters' weights, summed.
        edits: weight, edit and seed of each adapter that changes the tensor.
        added: axis and ids of entries that the edits bring anew (added tokens); there the weighted mean stands.
        matrices: of a stack of experts, the tensors that it is made of; each is put together by itself.
    """

    method: Method
    density: float
    total: float
    edits: Sequence[tuple[float, Edit, int]]
    added: tuple[int, tuple[int, ...]] | None = None
    matrices: tuple[Matrix, ...] = ()

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None:
            raise RequestError("tensors that an adapter creates (new heads) cannot be put together")
        start = old.float()
        made = [edit(old) for _, edit, _ in self.edits]
        if self.added is not None:
            axis, ids = self.added
            places = torch.tensor(ids, dtype=torch.long)
            rows = mean([w for w, _, _ in self.edits], [new.index_select(axis, places) for new in made])
            made = [new.clone().index_copy_(axis, places, rows) for new in made]
            grown = made[0].clone()
            grown.narrow(axis, 0, start.shape[axis]).copy_(start)
            start = grown.index_copy_(axis, places, rows)
            # What lies between the old entries and the added ones is padding of the training's: it stays the first's.
        if self.matrices:
            return self._by_matrix(start, made)
        terms = [Term(weight, new - start, seed) for (weight, _, seed), new in zip(self.edits, made, strict=True)]
        return start + self.method(terms, self.density, self.total)

    def _by_matrix(self, start: Tensor, made: Sequence[Tensor]) -> Tensor:
        result = start.clone()
        for matrix in self.matrices:
            old, news = matrix.of(start), [matrix.of(new) for new in made]
            terms = [
                Term(weight, new - old, seeded(seed, matrix.name))
                for (weight, _, seed), new in zip(self.edits, news, strict=True)
            ]
            matrix.of(result).add_(self.method(terms, self.density, self.total))
        return result

    def alone(self, matrix: Matrix, edits: Sequence[Edit]) -> Fused:
        """What it does to one matrix; `edits` are what the adapters do to that one."""
        parts = [
            (weight, edit, seeded(seed, matrix.name)) for (weight, _, seed), edit in zip(self.edits, edits, strict=True)
        ]
        return Fused(self.method, self.density, self.total, parts)

    def by_entries(self, shape: tuple[int, ...]) -> Callable[[int, int], Edit] | None:
        """The same edit for some matrices of a stack at a time, as `edits.by_rows`; None where it has no matrices."""
        parts = [by_rows(edit, shape, shape) for _, edit, _ in self.edits]
        rows = [part for part in parts if part is not None]
        if not self.matrices or len(rows) < len(parts):
            return None

        def some(start: int, stop: int) -> Fused:
            each = zip(self.edits, rows, strict=True)
            edits = [(weight, part(start, stop), seed) for (weight, _, seed), part in each]
            here = [replace(one, entry=one.entry - start) for one in self.matrices if start <= one.entry < stop]
            return replace(self, edits=edits, matrices=tuple(here))

        return some


def mean(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    """The weighted mean; equal values stay what they are, bit for bit.

    Raises:
        RequestError: weights that sum to nothing.
    """
    if all(torch.equal(values[0], value) for value in values[1:]):
        return values[0].float()
    total = sum(weights)
    if abs(total) <= 1e-9 * sum(map(abs, weights)):
        raise RequestError(
            message(
                "weights that sum to 0, of which the rows of added tokens would be the mean",
                where="weights",
                found=", ".join(f"{weight:g}" for weight in weights),
                remedy="Give weights with another sum.",
            )
        )
    made: Tensor = sum(
        (weight / total * value.float() for weight, value in zip(weights, values, strict=True)),
        torch.zeros_like(values[0], dtype=torch.float32),
    )
    return made
