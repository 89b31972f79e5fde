"""What became of each tensor that an adapter changed: factors of the change, the tensor whole, or nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast, final

from adapters import lowrank, shards
from adapters.changes import Changes, Originals
from adapters.edits import AddLowRank, AddLowRanks, PutEntries, Replace
from adapters.errors import NumbersError, RequestError, message
from adapters.lowrank import Factors, FactorStack
from adapters.parts import rows_of
from adapters.stored import Stacked, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.anatomy import LinearMap
    from adapters.edits import Edit, Values
    from adapters.experts import Stack


@final
@dataclass(frozen=True)
class Part:
    """What became of one tensor.

    Attributes:
        kind: "factors", "whole", "left out" or "unchanged".
        rank: of the factors, 0 where there are none.
        norm: Frobenius norm of the change; error: of what is missing of it.
    """

    kind: str
    rank: int = 0
    norm: float = 0.0
    error: float = 0.0

    @property
    def share(self) -> float:
        """The error as a share of the change."""
        return self.error / self.norm if self.norm else 0.0


@final
@dataclass(frozen=True)
class Size:
    """How much is kept, as it was asked for."""

    rank: int | None
    energy: float | None
    only_factors: bool

    def to_json(self) -> dict[str, Any]:
        asked = {"rank": self.rank, "energy": self.energy, "only_factors": self.only_factors or None}
        return {name: value for name, value in asked.items() if value is not None}


@final
@dataclass(frozen=True)
class Maps:
    """The matrices that LoRA can adapt, by module path; of these the ones inside the blocks; stacks, by name.

    Subclasses of the plain layers are left out: what they do with their weight is their own affair. So are weights
    that stand in several places.
    """

    all: Mapping[str, LinearMap]
    inside: frozenset[str]
    stacks: Mapping[str, Stack] = field(default_factory=dict)

    def of(self, name: str) -> LinearMap | None:
        """The matrix of a tensor."""
        return self.all.get(name.removesuffix(".weight")) if name.endswith(".weight") else None


def maps_of(found: Changes, originals: Originals) -> Maps:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    from adapters import experts
    from adapters.anatomy import linear_maps, main_names
    from adapters.blueprint import drawn
    from adapters.injection import candidates
    from adapters.storage import task_of

    task = task_of(found.document, str(found.folder))
    net = drawn(originals.folder, task, found.document["backbone"]["load"]).model
    plain, tied = (nn.Linear, nn.Embedding, Conv1D), main_names(net)
    known = {
        path: described
        for path, described in candidates(net, found.head).items()
        if type(net.get_submodule(path)) in plain and f"{path}.weight" not in tied
    }
    return Maps(known, frozenset(linear_maps(net)), experts.stacks(net))


def refuse_rank(found: Changes, maps: Maps, rank: int | None) -> None:
    """A rank can be no higher than the matrices inside the blocks are wide, nor than those of a LoRA adapter.

    Raises:
        RequestError: naming the smallest of them.
    """
    sizes = {
        name: min(described.shape)
        for name, edit in found.edits.items()
        if (described := maps.of(name)) is not None and (isinstance(edit, AddLowRank) or described.path in maps.inside)
    }
    sizes |= {n: min(stack.shape) for n, stack in maps.stacks.items() if isinstance(found.edits.get(n), AddLowRanks)}
    name = min(sizes, key=lambda each: sizes[each], default="")
    if rank is not None and name and rank > sizes[name]:
        raise RequestError(
            message(
                "the rank is above that of a matrix",
                where=f"rank: {name}",
                expected=f"at most {sizes[name]}",
                found=rank,
                remedy="Give a lower rank, or energy=, which finds one for each matrix.",
            )
        )


def brought(found: Changes) -> dict[str, Tensor]:
    """What a new model has and the backbone has not: the head, and the entries of added tokens."""
    whole: dict[str, Tensor] = {}
    axes = (found.document["vocabulary"] or {"axes": {}})["axes"]
    for name, edit in found.edits.items():
        if name in found.head:
            whole[name] = _new(edit, None)
        elif name in axes and isinstance(edit, PutEntries):
            whole[name] = _values(edit.values)
    return whole


def taken_apart(
    name: str, edit: Edit, originals: Originals, maps: Maps, size: Size
) -> tuple[Part, Factors | FactorStack | None, Tensor | None]:
    """One tensor: what became of it, and its factors or itself where it changed."""
    import torch

    described = maps.of(name)
    if isinstance(edit, AddLowRank) and described is not None:
        if not bool(edit.up.any()) or not bool(edit.down.any()):
            return Part("unchanged"), None, None
        fit = lowrank.reduced(lowrank.of_edit(edit), rank=size.rank, energy=size.energy)
        return Part("factors", fit.factors.rank, fit.norm, fit.error), fit.factors, None
    if isinstance(edit, AddLowRanks) and name in maps.stacks:
        return _stack_reduced(edit, size)
    if isinstance(edit, Replace) and originals.is_stack(name) and tuple(edit.new.shape) == originals.shape(name):
        return _stack_apart(name, edit.new, originals, maps.stacks.get(name), size)
    old = originals.old(name)
    new = _new(edit, old)
    if old.shape == new.shape and torch.equal(old.to(new.dtype), new):
        return Part("unchanged"), None, None
    if not bool(torch.isfinite(new).all()):
        raise NumbersError(message("a tensor with values that are not finite", where=name))
    if old.shape != new.shape:  # grown by added tokens, and trained whole
        return Part("whole"), None, new
    delta = new.float() - old
    norm = float(torch.linalg.vector_norm(delta, dtype=torch.float64))
    if described is None:
        return Part("whole", norm=norm), None, new
    if size.rank is None and size.energy is None:
        size = replace(size, energy=lowrank.unrounded(norm, float(torch.linalg.vector_norm(old, dtype=torch.float64))))
    fit = _factored(delta.T if described.transposed else delta, size)
    numbers = fit.factors.down.numel() + fit.factors.up.numel()
    if (
        described.path not in maps.inside and 4 * numbers >= new.nbytes
    ):  # an embedding, say: whole, it is smaller and nothing is lost
        return Part("whole", norm=norm), None, new
    return Part("factors", fit.factors.rank, fit.norm, fit.error), fit.factors, None


def _stack_reduced(edit: AddLowRanks, size: Size) -> tuple[Part, FactorStack | None, None]:
    """Factors of experts, each brought to the rank by itself."""
    if edit.nothing:
        return Part("unchanged"), None, None
    fits = [lowrank.reduced(pair, rank=size.rank, energy=size.energy) for pair in lowrank.of_edits(edit)]
    return *_stacked(fits), None


def _stacked(fits: Sequence[lowrank.Fit]) -> tuple[Part, FactorStack]:
    found = FactorStack.of([fit.factors for fit in fits])
    norm, error = (math.hypot(*values) for values in zip(*((fit.norm, fit.error) for fit in fits), strict=True))
    return Part("factors", found.rank, norm, error), found


def _stack_apart(
    name: str, values: Values, originals: Originals, stack: Stack | None, size: Size
) -> tuple[Part, FactorStack | None, Tensor | None]:
    """A stack of experts, one matrix after the other: factors where a rank or an energy is asked for, else whole.

    Whether their exact rank is low would take a decomposition of every expert to find out.
    """
    import torch

    square, moved = 0.0, False
    fits: list[lowrank.Fit] = []
    low = stack if size.rank is not None or size.energy is not None else None
    for index, old in enumerate(originals.entries(name)):
        new = _values(rows_of(values, index, 0, old.shape[0]))
        if not bool(torch.isfinite(new).all()):
            raise NumbersError(message("a tensor with values that are not finite", where=f"{name}, expert {index}"))
        delta = new.float() - old
        if not torch.equal(old.to(new.dtype), new):
            moved = True
            square += float(torch.linalg.vector_norm(delta, dtype=torch.float64)) ** 2
        if low is not None:
            matrix = delta.T if low.transposed else delta
            fits.append(lowrank.factored(matrix, rank=size.rank, energy=size.energy))
    if not moved:
        return Part("unchanged"), None, None
    if fits:
        part, found = _stacked(fits)
        if size.rank is not None or found.down.numel() + found.up.numel() < math.prod(values.shape):
            return part, found, None
    return Part("whole", norm=square**0.5), None, _values(values)


def _new(edit: Edit, old: Tensor | None) -> Tensor:
    """The tensor after the edit; where it was replaced, in its own dtype."""
    match edit:
        case Replace(new) if old is None or new.shape == old.shape:
            return _values(new)
    return edit(old)


def _values(values: Values) -> Tensor:
    """A tensor in memory, or read from its file."""
    if isinstance(values, Stacked):
        return values.read()
    return shards.read_tensor(values.slot) if isinstance(values, Stored) else cast("Tensor", values)


def _factored(matrix: Tensor, size: Size) -> lowrank.Fit:
    """Factors of a change of shape (out, in); columns of zeros, as of tokens that no row had, cost nothing."""
    import torch

    moved = matrix.any(dim=0).nonzero().flatten()
    if 2 * moved.numel() > matrix.shape[1]:
        return lowrank.factored(matrix, rank=size.rank, energy=size.energy)
    fit = lowrank.factored(matrix[:, moved], rank=size.rank, energy=size.energy)
    down = torch.zeros(fit.factors.rank, matrix.shape[1])
    down[:, moved] = fit.factors.down
    return lowrank.Fit(Factors(down, fit.factors.up), fit.norm, fit.error)
