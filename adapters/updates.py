"""What an adapter did to its backbone as low-rank factors, module by module, and what no factors can say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from adapters.edits import AddLowRank
from adapters.lowrank import Factors, factored, of_edit, reduced

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.anatomy import LinearMap
    from adapters.changes import Changes, Originals


@final
@dataclass(frozen=True)
class Updates:
    """An adapter's changes.

    Attributes:
        factors: module path -> up @ down of shape (out, in), at scale 1.
        transposed: of these modules, those whose weight the backbone keeps as (in, out).
        tables: of these modules, embeddings; their "in" is the vocabulary.
        whole: own name -> new values of every other tensor that is another now, the head's included.
        head: names of the head's among these.
        norm: Frobenius norm of all low-rank changes; error: of what was cut from them.
    """

    factors: Mapping[str, Factors]
    transposed: frozenset[str]
    tables: frozenset[str]
    whole: Mapping[str, Tensor]
    head: frozenset[str]
    norm: float
    error: float

    @property
    def rank(self) -> int:
        """The highest of all modules."""
        return max((pair.rank for pair in self.factors.values()), default=0)

    @property
    def share(self) -> float:
        """What was cut, as a share of the norm."""
        return self.error / self.norm if self.norm else 0.0

    def uniform(self) -> dict[str, Factors]:
        """All at the highest rank: rows and columns of zeros make up for the rest, which changes no product."""
        return {path: pair.padded(self.rank) for path, pair in self.factors.items()}


def updates(changes: Changes, base: Originals, maps: Mapping[str, LinearMap], rank: int | None = None) -> Updates:
    """The changes of an adapter; every tensor of the backbone that it changes is read, and compared.

    Args:
        changes: the adapter's.
        base: its backbone.
        maps: the linear maps inside the blocks.
        rank: cut to it what is above; None keeps every change whole.

    Raises:
        BackboneError: the base is not the recorded one.
    """
    factors: dict[str, Factors] = {}
    transposed, tables = set[str](), set[str]()
    whole: dict[str, Tensor] = {}
    squares, lost = 0.0, 0.0
    for name, edit in changes.edits.items():
        path = name.removesuffix(".weight")
        if name in changes.head:
            whole[name] = edit(None)
        elif isinstance(edit, AddLowRank):
            base.compare(name)  # not needed, but it must be the adapter's own
            pair = of_edit(edit)
            fit = reduced(pair, rank=rank) if rank is not None and pair.rank > rank else None
            factors[path] = pair if fit is None else fit.factors
            squares += _square(pair)
            lost += 0.0 if fit is None else fit.error**2
            if edit.transposed:
                (transposed if path in maps else tables).add(path)
        elif path in maps and path != name:
            delta = base.delta(name, edit)
            if not bool(delta.any()):
                continue
            fit = factored(delta.T if maps[path].transposed else delta, rank=rank)
            factors[path] = fit.factors
            squares, lost = squares + fit.norm**2, lost + fit.error**2
            if maps[path].transposed:
                transposed.add(path)
        else:
            old = base.old(name)
            new = edit(old)
            if new.shape != old.shape or bool((new != old).any()):
                whole[name] = new
    return Updates(
        factors,
        frozenset(transposed),
        frozenset(tables),
        whole,
        frozenset(changes.head & set(whole)),
        squares**0.5,
        lost**0.5,
    )


def _square(pair: Factors) -> float:
    """The squared norm of a product, without forming it."""
    up, down = pair.up.double(), pair.down.double()
    return float(((up.T @ up) * (down @ down.T)).sum().clamp_min(0))
