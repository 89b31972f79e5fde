"""Adapters that are to become one, computed at any weights.

Computed is on what training did to each tensor, whatever the strategy: a sum of low-rank updates stays factors,
exactly; what is no update of a linear map becomes a whole tensor; what is dense in a linear map becomes factors where
that is exact and smaller, or where a rank is asked for.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, final

from adapters import lowrank, shards
from adapters.anatomy import LinearMap, own_name
from adapters.arithmetic import Fused, Matrix, Method, Term, mean, seeded
from adapters.changes import Changes, Originals
from adapters.edits import AddLowRank, AddLowRanks, Blend, Edit, MergeLayer, PutEntries, Replace
from adapters.errors import RequestError, message
from adapters.lowrank import Factors, FactorStack, Fit
from adapters.manifest import WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.shards import Slot

WEIGHT: Final = ".weight"


@final
@dataclass(frozen=True)
class Made:
    """The tensors of a combined adapter.

    Attributes:
        factors: by module path.
        whole: by the backbone's own names, the head's among them.
        fits: of the factors that were found or cut, by module path: how exact they are.
        stacks: factors of experts, by the names of the stacks; their fits go by `name.number`.
    """

    factors: dict[str, Factors]
    whole: dict[str, Tensor]
    fits: dict[str, Fit]
    stacks: dict[str, FactorStack] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """What was left out of the linear maps' change, as a share of its norm (Frobenius, all of them together)."""
        norm = sum(fit.norm**2 for fit in self.fits.values()) ** 0.5
        return sum(fit.error**2 for fit in self.fits.values()) ** 0.5 / norm if norm else 0.0

    @property
    def worst(self) -> tuple[str, float]:
        """The module that lost the largest share of its change."""
        shares = {path: fit.share for path, fit in self.fits.items()}
        path = max(shares, key=lambda name: shares[name], default="")
        return path, shares.get(path, 0.0)


@final
@dataclass(frozen=True)
class Mixture:
    """Adapters of one backbone, and how they become one.

    Attributes:
        parts: the adapters, in the order in which weights are given.
        like: the one whose head, task and processor the result has.
        base: the backbone's values.
        maps: the linear maps that may hold factors, by path.
        heads: tensors of a head that the backbone's checkpoint has and all of them trained on: name -> where it lies.
        method, density, scale, seed: of the arithmetic.
        kept: deltas and old values that were computed, where they are asked for again and again; None keeps none.
    """

    parts: tuple[Changes, ...]
    like: Changes
    base: Originals
    maps: Mapping[str, LinearMap]
    heads: Mapping[str, Slot]
    method: Method
    density: float
    scale: float
    seed: int
    kept: dict[tuple[str, int], Tensor] | None = field(default=None, compare=False)

    @functools.cached_property
    def changed(self) -> tuple[dict[str, Edit], ...]:
        """Of each adapter, what it did to tensors that were there before."""
        return tuple(
            part.inside | {name: part.edits[name] for name in self.heads if name in part.head} for part in self.parts
        )

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The tensors that any of them changes."""
        return tuple(dict.fromkeys(name for edits in self.changed for name in edits))

    @property
    def brought(self) -> dict[str, Edit]:
        """The head that the result has as one adapter brings it."""
        own = self.like.head - set(self.heads)
        return {name: edit for name, edit in self.like.edits.items() if name in own}

    @property
    def packed(self) -> bool:
        """Whether the backbone's linear maps are kept in 4 bits: beside them stand factors only."""
        return bool(self.like.document["backbone"]["packed"])

    @functools.cached_property
    def dtype(self) -> str:
        """Of the adapters' own tensors, where all are of one."""
        kinds = {entry["dtype"] for part in self.parts for entry in part.document["tensors"].values()}
        return str(kinds.pop()) if len(kinds) == 1 else "float32"

    def paths(self) -> list[str]:
        """The linear maps that any of them changes."""
        return [path for name in self.names if (path := self._path(name)) is not None]

    def stacked(self) -> dict[str, int]:
        """The stacks of experts that all who change them gave factors, with the highest rank of their matrices."""
        found = {}
        for name in self.names:
            edits = [edits[name] for edits in self.changed if name in edits]
            shapes = [edit.shape[1:] for edit in edits if isinstance(edit, AddLowRanks)]
            if len(shapes) == len(edits):
                found[name] = min(shapes[0])
        return found

    def refuse_rank(self, rank: int | None, energy: float | None) -> None:
        """A rank must fit into one of the matrices at least; smaller ones keep their own.

        Raises:
            RequestError: it does not, or there is no matrix.
        """
        if rank is None and energy is None:
            return
        sizes = {path: min(self.maps[path].shape) for path in self.paths()} | self.stacked()
        if not sizes:
            raise RequestError(
                message(
                    "no linear map was changed, of which a rank could be cut", where="rank, energy", remedy="Give none."
                )
            )
        largest = max(sizes, key=lambda path: sizes[path])
        if rank is not None and rank > sizes[largest]:
            raise RequestError(
                message(
                    "a rank above the matrix",
                    where="rank",
                    expected=f"at most {sizes[largest]}, the rank of {largest}",
                    found=rank,
                    remedy="Give a lower rank, or an energy, which finds one for each matrix.",
                )
            )

    def _path(self, name: str) -> str | None:
        path = name.removesuffix(WEIGHT)
        return path if path != name and path in self.maps else None

    def _edits(self, name: str, weights: Sequence[float], zeros: bool) -> list[tuple[int, float, Edit]]:
        """Of each adapter that changes a tensor: its number, its weight, what it does."""
        return [
            (number, weight * self.scale, edits[name])
            for number, (edits, weight) in enumerate(zip(self.changed, weights, strict=True))
            if name in edits and (weight != 0 or zeros)
        ]

    def _seed(self, number: int, name: str) -> int:
        return seeded(self.seed, self.parts[number].document["files"][WEIGHTS]["sha256"], name)

    # ------------------------------------------------------------------ as edits

    def edits(self, weights: Sequence[float]) -> dict[str, Edit]:
        """What the whole does to each tensor of the backbone, the head included; nothing is computed yet."""
        made = {name: self._edit(name, weights) for name in self.names}
        for name in self.heads:  # a merge writes the head as the adapter brings it
            made[name] = Replace(self._whole(name, weights, [], fixed=True))
        return {name: edit for name, edit in made.items() if edit is not None} | self.brought

    def _edit(self, name: str, weights: Sequence[float], zeros: bool = False) -> Edit | None:
        found = self._edits(name, weights, zeros)
        if not found:
            return None
        entries = self._added(name)
        if entries is not None and name in self.like.document["vocabulary"]["axes"]:
            puts = [edit for _, _, edit in found if isinstance(edit, PutEntries)]
            values = mean([weight for _, weight, _ in found], [edit.values.float() for edit in puts])
            return PutEntries(puts[0].ids, values, puts[0].axis, puts[0].size)
        if self.method.sums and entries is None:
            return Blend([(weight, edit) for _, weight, edit in found])
        if len(found) == 1 and found[0][1] == 1 and self.density == 1:
            return found[0][2]
        edits = [(weight, edit, self._seed(number, name)) for number, weight, edit in found]
        return Fused(self.method, self.density, self._total(weights), edits, entries, self._matrices(name))

    def _matrices(self, name: str) -> tuple[Matrix, ...]:
        """Of a stack of experts the matrices that the checkpoint holds, or each expert's where it holds the stack."""
        if name in self.base.stacks:
            places = [(piece.entry, piece.start, piece.stop) for piece, _ in self.base.stacks[name]]
        elif self.base.is_stack(name) and (shape := self.base.shape(name)) is not None and shape[0] > 1:
            places = [(entry, 0, shape[1]) for entry in range(shape[0])]
        else:
            return ()
        return tuple(Matrix(entry, start, stop, f"{entry}.{start}") for entry, start, stop in places)

    def _total(self, weights: Sequence[float]) -> float:
        return sum(abs(weight * self.scale) for weight in weights)

    def _added(self, name: str) -> tuple[int, tuple[int, ...]] | None:
        """Axis and ids of the added tokens in a tensor that grew with them."""
        entry = self.like.document["vocabulary"]
        axes = {**entry["axes"], **entry["whole"]} if entry is not None else {}
        return (axes[name], tuple(entry["ids"])) if name in axes else None

    # ------------------------------------------------------------------ as tensors

    def made(
        self,
        weights: Sequence[float],
        *,
        rank: int | None = None,
        energy: float | None = None,
        fixed: bool = False,
    ) -> Made:
        """The tensors of the adapter that the whole is.

        Args:
            weights: one an adapter.
            rank, energy: of the factors, as for `lowrank.reduced`; without them nothing is left out.
            fixed: the shapes do not hang on the weights, so that a live adapter can take one after the other.
        """
        result = Made({}, {name: edit(None) for name, edit in self.brought.items()}, {})
        for name in self.names:
            found = self._edits(name, weights, zeros=fixed or name in self.heads)
            if found:
                self._make(result, name, weights, found, rank, energy, fixed)
        return result

    def _make(
        self,
        result: Made,
        name: str,
        weights: Sequence[float],
        found: list[tuple[int, float, Edit]],
        rank: int | None,
        energy: float | None,
        fixed: bool,
    ) -> None:
        path = self._path(name)
        edits = [edit for _, _, edit in found]
        low = [(weight, edit) for _, weight, edit in found if isinstance(edit, AddLowRanks)]
        if self.method.sums and len(low) == len(found):
            self._make_stack(result, name, low, rank, energy, fixed)
            return
        if path is None and any(isinstance(edit, MergeLayer) for edit in edits):
            if (change := self._delta(name, weights, found)) is not None:
                result.whole[name] = self._old(name) + change
            return
        if path is None or self._added(name) is not None:
            result.whole[name] = self._whole(name, weights, edits, fixed)
            return
        width, height = self.maps[path].shape
        pairs = [(weight, lowrank.of_edit(edit)) for _, weight, edit in found if isinstance(edit, AddLowRank)]
        cut = rank is not None or energy is not None
        if self.method.sums and len(pairs) == len(found):
            pair = lowrank.summed(pairs)
            if cut or pair.rank > min(width, height):
                most = min(pair.rank, width, height, rank if rank is not None else width)
                result.fits[path] = fit = lowrank.reduced(pair, rank=rank, energy=energy)
                pair = fit.factors.padded(most) if fixed else fit.factors
            result.factors[path] = pair
            return
        replaced = all(isinstance(edit, Replace) for edit in edits)
        if not cut and not self.packed and replaced:
            result.whole[name] = self._whole(name, weights, edits, fixed)
            return
        delta = self._delta(name, weights, found)
        if delta is None:
            return
        if not cut and not self.packed and fixed:
            result.whole[name] = self._old(name) + delta
            return
        if not cut:
            energy = self._rounded(name, delta)
        fit = lowrank.factored(delta.T if self.maps[path].transposed else delta, rank=rank, energy=energy)
        if not cut and not self.packed and fit.factors.rank * (width + height) >= width * height:
            result.whole[name] = self._old(name) + delta  # exact all the same, and smaller
            return
        result.fits[path] = fit
        most = min(width, height, rank if rank is not None else width)
        result.factors[path] = fit.factors.padded(most) if fixed else fit.factors

    def _make_stack(
        self,
        result: Made,
        name: str,
        low: Sequence[tuple[float, AddLowRanks]],
        rank: int | None,
        energy: float | None,
        fixed: bool,
    ) -> None:
        """Factors of experts side by side, expert by expert; cut as those of linear maps are."""
        pairs = [
            lowrank.summed([(w, lowrank.of_edit(edit.entry(at))) for w, edit in low])
            for at in range(low[0][1].shape[0])
        ]
        most = min(pairs[0].rank, *pairs[0].shape, rank if rank is not None else pairs[0].rank)
        if rank is not None or energy is not None or pairs[0].rank > most:
            fits = [lowrank.reduced(pair, rank=rank, energy=energy) for pair in pairs]
            result.fits.update({f"{name}.{at}": fit for at, fit in enumerate(fits)})
            pairs = [fit.factors for fit in fits]
        result.stacks[name] = FactorStack.of(pairs, most if fixed else 0)

    def _whole(self, name: str, weights: Sequence[float], edits: Sequence[Edit], fixed: bool) -> Tensor:
        """A tensor as it becomes, in the dtype that all adapters have it in; of one that only grew, its new entries."""
        import torch

        edit = self._edit(name, weights, zeros=fixed or name in self.heads)
        if isinstance(edit, PutEntries):
            return edit.values.float()
        assert edit is not None
        whole = all(isinstance(entry, Replace) for entry in edits)
        return edit(self._old(name)).to(getattr(torch, self.dtype) if whole else torch.float32)

    def _delta(self, name: str, weights: Sequence[float], found: list[tuple[int, float, Edit]]) -> Tensor | None:
        """What all add to a tensor; None where each leaves it as it is (a bias of a layer that DoRA adapts)."""
        terms = [
            Term(weight, self._one(name, number, edit), self._seed(number, name)) for number, weight, edit in found
        ]
        if not any(bool(term.delta.any()) for term in terms):
            return None
        return self.method(terms, self.density, self._total(weights))

    def _rounded(self, name: str, delta: Tensor) -> float | None:
        """The energy of a delta that is no rounding of the float32 weight that it was read off."""
        return lowrank.unrounded(float(delta.double().norm()), float(self._old(name).double().norm()))

    def _one(self, name: str, number: int, edit: Edit) -> Tensor:
        """What one adapter adds to a tensor."""
        if self.kept is not None and (name, number) in self.kept:
            return self.kept[name, number]
        if isinstance(edit, AddLowRank | AddLowRanks):
            delta = edit.delta()
        else:
            old = self._old(name)
            delta = edit(old) - old
        if self.kept is not None:
            self.kept[name, number] = delta
        return delta

    def _old(self, name: str) -> Tensor:
        if self.kept is not None and (name, -1) in self.kept:
            return self.kept[name, -1]
        old = shards.read_tensor(self.heads[name]).float() if name in self.heads else self.base.old(name)
        if self.kept is not None:
            self.kept[name, -1] = old
        return old

    def state(self, adapted: Any, made: Made) -> dict[str, Tensor]:
        """The tensors by their keys in the file of a live adapter that was loaded from tensors of these shapes."""
        strategy, vocabulary = adapted.strategy, adapted.vocabulary
        axes = vocabulary.axes if vocabulary is not None else {}
        held = made.factors or made.stacks
        state: dict[str, Tensor] = dict(strategy.tensors(made.factors, made.stacks)) if held else {}
        for name in adapted.trained:
            if own_name(name) in made.whole and own_name(name) not in axes:
                state[strategy.key(name)] = made.whole[own_name(name)]
        return state | {vocabulary.key(strategy, name): made.whole[name] for name in axes}
