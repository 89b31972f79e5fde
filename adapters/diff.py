"""What tells two adapters apart: their manifests, what each changes of their backbone, and their answers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import changes, data, dissent, heatmap, ledger, lowrank, siblings
from adapters.changes import Changes, Originals, unlike
from adapters.dissent import Agreement
from adapters.edits import AddLowRank, Edit, Replace
from adapters.errors import RequestError, message
from adapters.ledger import Entry
from adapters.lowrank import Factors
from adapters.profile import (
    Place,
    aligned,
    at_hand,
    block_name,
    cells,
    factors_of,
    idle,
    norm_of,
    order_of,
    place_of,
)
from adapters.progress import Job

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

SHOWN = 40  # lines of one table for people


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


@final
@dataclass(frozen=True)
class Together:
    """Tensors of one block or kind together.

    Attributes:
        name: of the group.
        tensors: how many.
        a, b, difference: roots of the sums of the squared norms.
        cosine: between all changes as one vector; None where one is zero.
        inputs, outputs: mean overlaps; None where there are none.
        chance: what both would be of random subspaces.
    """

    name: str
    tensors: int
    a: float
    b: float
    difference: float
    cosine: float | None
    inputs: float | None
    outputs: float | None
    chance: tuple[float, float] | None


@final
@dataclass(frozen=True)
class Difference:
    """Two adapters side by side.

    Attributes:
        a, b: their folders.
        same: every trained tensor is the same, bit for bit, and means the same: strategy, task and backbone.
        apart: why their changes were not compared: the backbones differ; empty where they do not.
        manifest: what differs in their manifests.
        tensors: every tensor that one of them changes; empty where they are apart.
        agreement: of their answers; None where no rows were given.
        notes: what could not be told, and why.
    """

    a: str
    b: str
    same: bool
    apart: str
    manifest: tuple[Entry, ...]
    tensors: tuple[Compared, ...]
    agreement: Agreement | None
    notes: tuple[str, ...]

    @property
    def known(self) -> tuple[Compared, ...]:
        """Tensors of the backbone of which both changes and their difference are known."""
        return tuple(o for o in self.tensors if None not in (o.a, o.b, o.difference) and not o.new)

    @property
    def total(self) -> Together:
        """All of them together."""
        return together("total", self.known)

    def blocks(self) -> list[Together]:
        """By block, bottom to top; what stands outside last."""
        return _grouped(self.known, lambda one: block_name(one.place))

    def kinds(self) -> list[Together]:
        """By kind of module inside the blocks."""
        return _grouped([one for one in self.known if one.place.block is not None], lambda one: one.place.kind)

    def picture(self, file: str | Path) -> Path:
        """Draw the cosine between the two changes, block by kind of module.

        Raises:
            RequestError: neither .png nor .svg, no such folder, nothing that both change.
            MissingPackageError: matplotlib is not installed.
        """
        known = [(one.name, one.place, one.cosine) for one in self.known if one.cosine is not None]
        return heatmap.draw(
            *cells(known),
            file,
            title=f"A: {Path(self.a).name}    B: {Path(self.b).name}\ncosine between what each changes",
            scale=heatmap.Scale("cosine", signed=True),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "apart": self.apart,
            "manifest": [asdict(entry) for entry in self.manifest],
            "tensors": [asdict(one) for one in self.tensors],
            "total": asdict(self.total),
            "blocks": [asdict(group) for group in self.blocks()],
            "kinds": [asdict(group) for group in self.kinds()],
            "agreement": self.agreement.to_json() if self.agreement is not None else None,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """Tables for people."""
        found = [f"A         {self.a}", f"B         {self.b}"]
        if self.same:
            found.append("the same, bit for bit: every trained tensor, strategy, task and backbone")
        found += ["", *ledger.lines(self.manifest)]
        if self.apart:
            found += ["", f"the changes are not compared: {self.apart}"]
        elif not self.same:
            found += ["", *self._changes()]
        found += ["", *self.agreement.lines()] if self.agreement is not None else []
        return found + (["", *(f"note      {note}" for note in self.notes)] if self.notes else [])

    def _changes(self) -> list[str]:
        total = self.total
        counts = {who: sum(one.changed == who for one in self.tensors) for who in ("both", "a", "b")}
        equal = sum(one.changed == "both" and one.difference == 0 for one in self.tensors)
        found = [
            f"tensors   {counts['both']} changed by both ({equal} of them alike), {counts['a']} only by A, "
            f"{counts['b']} only by B"
        ]
        if total.tensors:
            found += ["", *_table("changes of the backbone", [total])]
        if total.chance is not None:
            found.append(f"random subspaces of these ranks overlap by {total.chance[0]:.3f} and {total.chance[1]:.3f}")
        for title, groups in (("by kind of module", self.kinds()), ("by block", self.blocks())):
            if len(groups) > 1:
                found += ["", *_table(title, groups)]
        others = [one for one in self.tensors if one not in self.known or one.place.block is None]
        rows = [
            (one.name, one.changed, _number(one.a), _number(one.b), _number(one.difference), _share(one.cosine))
            for one in others
        ]
        if rows:
            title = "new, or outside the blocks" if all(o.new or o.place.block is None for o in others) else "others"
            found += ["", *aligned((title, "by", "|A|", "|B|", "|A - B|", "cosine"), rows[:SHOWN])]
            found += [f"... and {len(rows) - SHOWN} more"] if len(rows) > SHOWN else []
        return found


def diff(
    a: str | Path,
    b: str | Path,
    *,
    base: str | Path | None = None,
    rows: Any = None,
    columns: Mapping[str, str] | None = None,
    say: Callable[[str], None] | None = None,
) -> Difference | siblings.Checkpoints:
    """What tells two adapters apart, or two checkpoints of one architecture.

    Args:
        a, b: two adapter folders (or ids of adapters on the hub) of any strategies; or two transformers folders.
        base: the backbone's folder, where it is not the one that the adapters name. Nothing is downloaded for it.
        rows: rows that both answer: a file, a `Dataset`, dicts; the test part where there are parts.
        columns: task column -> column of the rows.
        say: takes what is to be said of the rows.

    Returns:
        What differs; of different backbones the manifests alone are compared, and it says so.

    Raises:
        FolderError: an adapter is damaged.
        BackboneError: the base is not the adapters' backbone.
        RequestError: an adapter beside a checkpoint; rows that cannot be answered by both.

    Source: subspace similarity, Hu et al. 2021 (LoRA), section 7.2; Hamm and Lee 2008.
    """
    plain = [siblings.is_checkpoint(folder) for folder in (a, b)]
    if all(plain):
        if rows is not None or base is not None:
            raise RequestError(message("base and rows are for adapters", where="diff", found="two checkpoints"))
        return siblings.compare(Path(a), Path(b))
    if any(plain):
        raise RequestError(
            message(
                "an adapter beside a checkpoint",
                where=f"{a}, {b}",
                expected="two adapters, or two transformers folders",
                remedy="Merge the adapter first: adapters merge.",
            )
        )
    one, two = changes.read(a), changes.read(b)
    odd, shared = changes.apart(one, two)
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    apart = f"the backbones differ in {len(odd)} of {shared} shared tensors: {'; '.join(odd[:3])}{more}" if odd else ""
    apart = apart if shared else "the backbones have no tensor in common"
    notes = [
        f"the adapters differ in their {what}: A {a_side}, B {b_side}" for what, a_side, b_side in unlike(one, two)
    ]
    tensors: tuple[Compared, ...] = ()
    if not apart:
        sides = [at_hand(side, base) for side in (one, two)]
        tensors = _compared(one, two, (sides[0][0], sides[1][0]))
        if any(one.a is None or one.b is None for one in tensors):
            notes.append("some changes are not known without the backbone: " + (sides[0][1] or sides[1][1]))
    answers = None
    if rows is not None:
        splits = data.read(rows, say)
        part = splits.get("test", splits.get("train"))
        if part is None:
            raise RequestError(
                message("the rows have no part 'test' or 'train'", where="rows", found=", ".join(splits))
            )
        answers = dissent.compared(one.folder, two.folder, part, columns or {}, base, say or logger.info)
    entries = ledger.entries(one.document, two.document)
    same = ledger.same(one.document, two.document)
    return Difference(str(one.folder), str(two.folder), same, apart, entries, tensors, answers, tuple(notes))


# ---------------------------------------------------------------------- tensor by tensor


def _compared(one: Changes, two: Changes, bases: tuple[Originals | None, Originals | None]) -> tuple[Compared, ...]:
    names = sorted(set(one.edits) | set(two.edits))
    found = []
    with Job("comparing the changes", len(names), "tensors") as job:
        for name in names:
            edits, heads = (one.edits.get(name), two.edits.get(name)), (name in one.head, name in two.head)
            pair = _pair(name, edits, heads, bases)
            found += [pair] if pair is not None else []
            job.advance(1)
    return tuple(found)


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
    norms: list[float | None] = [
        0.0 if edit is None else norm_of(delta) if delta is not None else None
        for edit, delta in zip(edits, deltas, strict=True)
    ]
    by = [edit is not None and not idle(edit, norm) for edit, norm in zip(edits, norms, strict=True)]
    if not any(by):
        return None
    changed = "both" if all(by) else "a" if by[0] else "b"
    difference, cosine = None, None
    if changed != "both":
        difference = norms[0] if changed == "a" else norms[1]
    elif deltas[0] is not None and deltas[1] is not None:
        if deltas[0].shape == deltas[1].shape:
            difference, cosine = _dense(deltas[0], deltas[1])
    elif isinstance(edits[0], Replace) and isinstance(edits[1], Replace) and edits[0].new.shape == edits[1].new.shape:
        difference = norm_of(edits[0].new.double() - edits[1].new.double())  # whatever stood there before
    return Compared(name, place, changed, norms[0], norms[1], difference, cosine, None, any(heads))


def _delta(name: str, edit: Edit, base: Originals | None, *, new: bool) -> Tensor | None:
    """What an edit adds; of a new tensor all of it; None where that cannot be told without the backbone."""
    if new:
        return edit(None)
    if isinstance(edit, AddLowRank):
        return edit.delta()
    return base.delta(name, edit) if base is not None else None


def _dense(one: Tensor, two: Tensor) -> tuple[float, float | None]:
    """Norm of the difference and cosine of two tensors."""
    a, b = norm_of(one), norm_of(two)
    inner = float((one.double() * two.double()).sum())
    return norm_of(one.double() - two.double()), _cosine(inner, a, b)


def _cosine(inner: float, a: float, b: float) -> float | None:
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
    return Compared(name, place, "both", a, b, 0.0 if alike else float(apart.norm()), _cosine(inner, a, b), overlap)


# ---------------------------------------------------------------------- together


def together(name: str, members: Sequence[Compared]) -> Together:
    """Changes of several tensors as one."""
    a, b = (math.hypot(*(getattr(one, side) or 0.0 for one in members)) for side in ("a", "b"))
    inner = sum((one.cosine or 0.0) * (one.a or 0.0) * (one.b or 0.0) for one in members)
    overlaps = [one.overlap for one in members if one.overlap is not None]

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    by_chance = [mean([one.chance_inputs for one in overlaps]), mean([one.chance_outputs for one in overlaps])]
    return Together(
        name,
        len(members),
        a,
        b,
        math.hypot(*(one.difference or 0.0 for one in members)),
        _cosine(inner, a, b),
        mean([one.inputs for one in overlaps]),
        mean([one.outputs for one in overlaps]),
        (by_chance[0], by_chance[1]) if by_chance[0] is not None and by_chance[1] is not None else None,
    )


def _grouped(members: Sequence[Compared], name: Callable[[Compared], str]) -> list[Together]:
    groups: dict[str, list[Compared]] = {}
    for one in sorted(members, key=lambda one: order_of(one.place)):
        groups.setdefault(name(one), []).append(one)
    return [together(key, found) for key, found in groups.items()]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(title: str, groups: Sequence[Together]) -> list[str]:
    rows = [
        (
            group.name,
            str(group.tensors),
            *map(_number, (group.a, group.b, group.difference)),
            *map(_share, (group.cosine, group.inputs, group.outputs)),
        )
        for group in groups[:SHOWN]
    ]
    more = [f"... and {len(groups) - SHOWN} more"] if len(groups) > SHOWN else []
    head = (title, "tensors", "|A|", "|B|", "|A - B|", "cosine", "overlap in", "out")
    return [*aligned(head, rows), *more]
