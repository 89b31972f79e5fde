"""What two adapters do to the same tensor: norms, difference, cosine, shared subspaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from adapters import lowrank
from adapters.changes import Changes, Originals
from adapters.edits import AddLowRank, AddLowRanks, Edit, Replace
from adapters.lowrank import Factors
from adapters.parts import delta_of
from adapters.profile import Place, factors_of, idle, place_of
from adapters.progress import Job
from adapters.spectra import norm_of

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True)
class Overlap:
    """How far two low-rank changes share a subspace: |U_a^T U_b|^2 / min(i, j), from 0 to 1 (LoRA paper, section 7.2).

    Attributes:
        ranks: i and j, the singular values of each change that are no rounding.
        inputs, outputs: of the directions that they read, and of those that they write.
        chance_inputs, chance_outputs: what random subspaces of these ranks would have: max(i, j) over the width.
    """

    ranks: tuple[int, int]
    inputs: float
    outputs: float
    chance_inputs: float
    chance_outputs: float


@final
@dataclass(frozen=True)
class Compared:
    """One tensor that at least one of two adapters changes.

    Attributes:
        name: the backbone's own.
        place: in the model.
        changed: "both", "a" or "b".
        a, b: Frobenius norm of each change; 0 where it is not changed; None where the backbone would be needed. Of new
            tensors (heads) that of the tensor itself.
        difference: norm of the one change minus the other; None where that cannot be told, or shapes differ.
        cosine: between the two changes as vectors; None where one is zero or not known.
        overlap: of two low-rank changes.
        new: nothing stood there before.
    """

    name: str
    place: Place
    changed: str
    a: float | None
    b: float | None
    difference: float | None
    cosine: float | None
    overlap: Overlap | None = None
    new: bool = False


def compared(one: Changes, two: Changes, bases: tuple[Originals | None, Originals | None]) -> tuple[Compared, ...]:
    """Every tensor that one of two adapters changes, in the order of their names.

    Args:
        one, two: on one backbone.
        bases: the backbone as each was trained on it, where it is at hand.
    """
    names = sorted(set(one.edits) | set(two.edits))
    found = []
    with Job("comparing the changes", len(names), "tensors") as job:
        for name in names:
            edits, heads = (one.edits.get(name), two.edits.get(name)), (name in one.head, name in two.head)
            base = next((base for base in bases if base is not None and base.is_stack(name)), None)
            fused = base is not None or any(isinstance(edit, AddLowRanks) for edit in edits)
            if fused and not any(heads):
                pairs = list(_experts(name, edits, base))
            else:
                pairs = [_pair(name, edits, heads, bases)]
            found += [pair for pair in pairs if pair is not None]
            job.advance(1)
    return tuple(found)


def _experts(name: str, edits: tuple[Edit | None, Edit | None], base: Originals | None) -> Iterator[Compared | None]:
    """A stack of experts, one matrix after the other, as `name.number`."""
    low = [edit for edit in edits if isinstance(edit, AddLowRanks)]
    if len(low) == sum(edit is not None for edit in edits):  # by their factors, without the backbone
        for index in range(low[0].shape[0]):
            one, two = (edit.entry(index) if isinstance(edit, AddLowRanks) else None for edit in edits)
            yield _pair(f"{name}.{index}", (one, two), (False, False), (None, None))
        return
    if base is None or not all(edit is None or isinstance(edit, Replace | AddLowRanks) for edit in edits):
        yield _pair(name, edits, (False, False), (base, base))
        return
    for index, old in enumerate(base.entries(name)):
        deltas = [delta_of(edit, index, old) if edit is not None else None for edit in edits]
        each = f"{name}.{index}"
        yield _of_deltas(each, place_of(each), edits, deltas, (False, False))


def _pair(
    name: str,
    edits: tuple[Edit | None, Edit | None],
    heads: tuple[bool, bool],
    bases: tuple[Originals | None, Originals | None],
) -> Compared | None:
    place = place_of(name, {name} if any(heads) else ())
    pairs = [factors_of(edit) if edit is not None else None for edit in edits]
    if pairs[0] is not None and pairs[1] is not None:
        return _low_rank(name, place, pairs[0], pairs[1])
    deltas = [
        _delta(name, edit, base, new=new) if edit is not None else None
        for edit, base, new in zip(edits, bases, heads, strict=True)
    ]
    return _of_deltas(name, place, edits, deltas, heads)


def _of_deltas(
    name: str,
    place: Place,
    edits: tuple[Edit | None, Edit | None],
    deltas: Sequence[Tensor | None],
    heads: tuple[bool, bool],
) -> Compared | None:
    """The comparison of two changes that are there as tensors; None where neither is one."""
    norms: list[float | None] = [
        0.0 if edit is None else norm_of(delta) if delta is not None else None
        for edit, delta in zip(edits, deltas, strict=True)
    ]
    by = [edit is not None and not idle(edit, norm) for edit, norm in zip(edits, norms, strict=True)]
    if not any(by):
        return None
    changed = "both" if all(by) else "a" if by[0] else "b"
    difference, angle = None, None
    if changed != "both":
        difference = norms[0] if changed == "a" else norms[1]
    elif deltas[0] is not None and deltas[1] is not None:
        if deltas[0].shape == deltas[1].shape:
            difference, angle = _dense(deltas[0], deltas[1])
    elif isinstance(edits[0], Replace) and isinstance(edits[1], Replace) and edits[0].new.shape == edits[1].new.shape:
        difference = norm_of(edits[0](None).double() - edits[1](None).double())  # whatever stood there before
    return Compared(name, place, changed, norms[0], norms[1], difference, angle, None, any(heads))


def _delta(name: str, edit: Edit, base: Originals | None, *, new: bool) -> Tensor | None:
    """What an edit adds; of a new tensor all of it; None where that cannot be told without the backbone."""
    if new:
        return edit(None)
    if isinstance(edit, AddLowRank | AddLowRanks):
        return edit.delta()
    return base.delta(name, edit) if base is not None else None


def _dense(one: Tensor, two: Tensor) -> tuple[float, float | None]:
    """Norm of the difference and cosine of two tensors."""
    a, b = norm_of(one), norm_of(two)
    inner = float((one.double() * two.double()).sum())
    return norm_of(one.double() - two.double()), cosine(inner, a, b)


def cosine(inner: float, a: float, b: float) -> float | None:
    """Between two vectors of these lengths; None where one is zero."""
    return max(-1.0, min(1.0, inner / (a * b))) if a and b else None


def _low_rank(name: str, place: Place, one: Factors, two: Factors) -> Compared:
    """Two low-rank changes by their factors: no product is formed."""
    import torch

    left_a, values_a, right_a = lowrank.turned(one)
    left_b, values_b, right_b = lowrank.turned(two)
    a, b = float(values_a.norm()), float(values_b.norm())
    if one.shape != two.shape:
        return Compared(name, place, "both", a, b, None, None)
    inner = float(((one.up.T @ two.up) * (one.down @ two.down.T)).sum())
    alike = one.up.equal(two.up) and one.down.equal(two.down)
    both = Factors(torch.cat([one.down, two.down]), torch.cat([one.up, -two.up], dim=1))
    apart = lowrank.turned(both)[1]
    ranks = tuple(lowrank.rank_of(values, max(one.shape)) for values in (values_a, values_b))
    overlap = None
    if min(ranks):
        i, j = ranks
        out, features = one.shape
        overlap = Overlap(
            (i, j),
            float((right_a[:i] @ right_b[:j].T).square().sum()) / min(i, j),
            float((left_a[:, :i].T @ left_b[:, :j]).square().sum()) / min(i, j),
            max(i, j) / features,
            max(i, j) / out,
        )
    return Compared(name, place, "both", a, b, 0.0 if alike else float(apart.norm()), cosine(inner, a, b), overlap)
