"""What an adapter changes, in numbers: each tensor's norms and ranks, beside the backbone's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import changes, heatmap, lowrank
from adapters.backbones import local_folder
from adapters.changes import Changes, Originals
from adapters.edits import AddLowRank, AddLowRanks, Edit, MergeLayer, PutEntries, Replace
from adapters.errors import RequestError, message
from adapters.inspection import describe
from adapters.lowrank import Factors
from adapters.manifest import backbone_name
from adapters.parts import rows_of
from adapters.progress import Job
from adapters.spectra import WIDE, Spectrum, norm_of, rounding_of, spectrum_of, summed_up

if TYPE_CHECKING:
    from torch import Tensor

OUTSIDE = "outside the blocks"
SHOWN = 40  # lines of one table for people


@final
@dataclass(frozen=True)
class Place:
    """Where a tensor stands in its model, read off its name.

    Attributes:
        stack: the list of blocks; empty outside of one.
        block: its number, from the bottom; None outside.
        kind: the rest of the name, other numbers as *.
    """

    stack: str
    block: int | None
    kind: str


def place_of(name: str, head: Iterable[str] = ()) -> Place:
    """The place of a tensor: the first number in its name is its block's."""
    words = name.split(".")
    number = next((at for at, word in enumerate(words) if word.isdigit()), None)
    if number is None or not number or name in head:
        return Place("", None, name)
    kind = ".".join("*" if word.isdigit() else word for word in words[number + 1 :])
    return Place(".".join(words[:number]), int(words[number]), kind)


@final
@dataclass(frozen=True)
class Changed:
    """What became of one tensor.

    Attributes:
        name: the backbone's own; of a stack of experts, with the expert's number behind it.
        place: in the model.
        shape: of the tensor.
        form: "low rank", "layer" (peft's own merge), "whole", "entries" (added tokens), or "new" (a head: nothing
            stood there before, so the tensor itself counts).
        norm: Frobenius norm of the change; None where the backbone would be needed and is not at hand.
        base: Frobenius norm of the backbone's tensor; None for new ones, and without a backbone.
        spectrum: of the change; None for vectors. Of convolutions the matrix of out channels by all the rest.
    """

    name: str
    place: Place
    shape: tuple[int, ...]
    form: str
    norm: float | None
    base: float | None
    spectrum: Spectrum | None

    @property
    def relative(self) -> float | None:
        """The change as a share of the backbone's tensor; None where that is not known, or zero."""
        return self.norm / self.base if self.norm is not None and self.base else None


@final
@dataclass(frozen=True)
class Group:
    """Tensors of one block, or of one kind, together.

    Attributes:
        name: of the group.
        tensors: how many.
        norm: root of the sum of the squared norms.
        base: likewise of the backbone's; None where one is not known.
        effective: mean effective rank; None where none has one.
    """

    name: str
    tensors: int
    norm: float
    base: float | None
    effective: float | None

    @property
    def relative(self) -> float | None:
        """norm over base."""
        return self.norm / self.base if self.base else None


@final
@dataclass(frozen=True)
class Profile:
    """What an adapter is and changes.

    Attributes:
        facts: of its manifest.
        base: the backbone's folder; empty where it is not at hand.
        tensors: every tensor that it changes, in the order of their names.
        notes: what could not be told, and why.
    """

    facts: Mapping[str, Any]
    base: str
    tensors: tuple[Changed, ...]
    notes: tuple[str, ...]

    @property
    def inside(self) -> tuple[Changed, ...]:
        """What it changes of the backbone itself, as far as the change is known."""
        return tuple(one for one in self.tensors if one.form != "new" and one.norm is not None)

    @property
    def total(self) -> Group:
        """All of it together, new tensors left out."""
        return gathered("total", self.inside)

    def blocks(self) -> list[Group]:
        """By block, bottom to top; what stands outside last."""
        return grouped(self.inside, lambda one: block_name(one.place))

    def kinds(self) -> list[Group]:
        """By kind of module inside the blocks."""
        return grouped((one for one in self.inside if one.place.block is not None), lambda one: one.place.kind)

    def picture(self, file: str | Path) -> Path:
        """Draw the change as a share of the backbone, block by kind of module; without a backbone its norm.

        Raises:
            RequestError: neither .png nor .svg, no such folder, nothing of the backbone is changed.
            MissingPackageError: matplotlib is not installed.
        """
        shares = bool(self.base)
        known = [(one, one.relative if shares else one.norm) for one in self.inside]
        what = "change, share of the backbone's tensor" if shares else "norm of the change"
        return heatmap.draw(
            *cells([(one.name, one.place, value) for one, value in known if value is not None]),
            file,
            title=f"what {Path(self.facts['folder']).name} ({self.facts['strategy']}) changes",
            scale=heatmap.Scale(what, percent=shares),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        return {
            "facts": dict(self.facts),
            "base": self.base,
            "tensors": [{**asdict(one), "relative": one.relative} for one in self.tensors],
            "total": _shown(self.total),
            "blocks": [_shown(group) for group in self.blocks()],
            "kinds": [_shown(group) for group in self.kinds()],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """A table for people."""
        total = self.total
        share = f", {_percent(total.relative)} of the backbone's tensors there" if total.base else ""
        found = [f"changes   {total.tensors} tensors, norm {_number(total.norm)}{share}" if total.tensors else ""]
        for title, groups in (("by kind of module", self.kinds()), ("by block", self.blocks())):
            if len(groups) > 1 or (groups and title == "by block"):
                found += ["", *table(title, groups)]
        outside = [one for one in self.tensors if one.form == "new" or one.place.block is None]
        if outside:
            found += ["", *_whole_table(outside[:SHOWN])]
            found += [f"... and {len(outside) - SHOWN} more"] if len(outside) > SHOWN else []
        found += ["", *(f"note      {note}" for note in self.notes)] if self.notes else []
        return found if found[0] else found[2:] if len(found) > 1 else found[1:]


def _shown(group: Group) -> dict[str, Any]:
    return {**asdict(group), "relative": group.relative}


def gathered(name: str, members: Sequence[Changed]) -> Group:
    """Changes of several tensors as one."""
    bases = [one.base for one in members]
    known = [base for base in bases if base is not None]
    ranks = [one.spectrum.effective for one in members if one.spectrum is not None and one.spectrum.effective]
    return Group(
        name,
        len(members),
        math.hypot(*(one.norm or 0.0 for one in members)),
        math.hypot(*known) if known and len(known) == len(bases) else None,
        sum(ranks) / len(ranks) if ranks else None,
    )


def grouped(members: Iterable[Changed], name: Callable[[Changed], str]) -> list[Group]:
    """The same by a name, in the order in which the names come up among blocks from the bottom."""
    groups: dict[str, list[Changed]] = {}
    for one in sorted(members, key=lambda one: order_of(one.place)):
        groups.setdefault(name(one), []).append(one)
    return [gathered(key, found) for key, found in groups.items()]


def order_of(place: Place) -> tuple[bool, bool, str, int]:
    """Blocks from the bottom, a decoder's above its encoder's; what stands outside last."""
    return place.block is None, "decoder" in place.stack, place.stack, place.block or 0


def block_name(place: Place) -> str:
    """A block as a table names it."""
    return OUTSIDE if place.block is None else f"{place.stack}.{place.block}"


def cells(
    members: Iterable[tuple[str, Place, float]],
) -> tuple[dict[tuple[str, str], float], list[tuple[str, float]]]:
    """Numbers of tensors as a picture takes them: by block and kind, and outside of the blocks.

    Where tensors share block and kind (experts) the number of greatest size stands.
    """
    inside: dict[tuple[str, str], float] = {}
    outside = []
    for name, place, value in sorted(members, key=lambda entry: order_of(entry[1])):
        if place.block is None:
            outside.append((name, value))
        else:
            key = block_name(place), place.kind
            inside[key] = max(inside.get(key, value), value, key=abs)
    return inside, outside


# ---------------------------------------------------------------------- measuring


def inspect(folder: str | Path, *, base: str | Path | None = None) -> Profile:
    """What an adapter is, and what it changes of its backbone, tensor by tensor.

    Low-rank changes are measured by their factors; no model is built, and of the backbone one tensor at a time is read
    and compared with the recorded fingerprint.

    Args:
        folder: an adapter folder, or the id of one on the hub.
        base: the backbone's folder, where it is not the one that the adapter names. Nothing is downloaded: where it is
            not at hand, changes of low rank are measured all the same, without their share of it.

    Raises:
        FolderError: the adapter is damaged.
        BackboneError: the backbone is another one.
        RequestError: no such base, or nothing can be told without it.

    Source: effective rank, Roy and Vetterli 2007; stable rank, Rudelson and Vershynin 2007.
    """
    found = changes.read(folder)
    originals, why = at_hand(found, base)
    with Job("measuring the changes", len(found.edits), "tensors") as job:
        tensors = []
        for name, edit in sorted(found.edits.items()):
            tensors += [one for one in _measured(name, edit, found.head, originals) if not idle(edit, one.norm)]
            job.advance(1)
    unknown = sum(one.norm is None for one in tensors)
    if unknown == len(tensors):
        raise RequestError(message("what the adapter changes cannot be told without its backbone", found=why))
    notes = [f"without the backbone no shares of it: {why}"] if originals is None and found.inside else []
    notes += [f"{unknown} tensors were replaced as a whole, and what they were before is not known"] if unknown else []
    if any(one.spectrum is not None and one.spectrum.effective is None for one in tensors):
        notes.append(f"matrices with more than {WIDE} rows and columns that are no product are not decomposed")
    place = str(originals.folder) if originals is not None else ""
    return Profile(describe(found.folder), place, tuple(tensors), tuple(notes))


def at_hand(found: Changes, base: str | Path | None) -> tuple[Originals | None, str]:
    """The backbone of an adapter where it is on this machine; else why not. One that was given must be there.

    Raises:
        RequestError, BackboneError: as `changes.originals`, where `base` is given or another backbone is at its place.
    """
    backbone = found.document["backbone"]
    name = backbone_name(found.document, found.folder)
    if base is None and (not name or local_folder(name, {"revision": backbone["revision"]}) is None):
        return None, f"{name or 'a live model'} is not on this machine; give its folder as base"
    try:
        return changes.originals(found, base), ""
    except RequestError as fault:
        if base is not None:
            raise
        return None, str(fault)


def _measured(name: str, edit: Edit, head: Iterable[str], originals: Originals | None) -> Iterator[Changed]:
    """What became of one tensor; of a stack of experts, of each matrix, as `name.number`, one in memory at a time."""
    if isinstance(edit, AddLowRanks) and name not in head:
        olds = originals.entries(name) if originals is not None else itertools.repeat(None, edit.shape[0])
        for index, old in enumerate(olds):
            each = f"{name}.{index}"
            yield _of_factors(each, place_of(each), edit.entry(index), old)
        return
    if originals is None or not isinstance(edit, Replace) or not originals.is_stack(name):
        yield _changed(name, edit, head, originals)
        return
    for index, old in enumerate(originals.entries(name)):
        delta = rows_of(edit.new, index, 0, old.shape[0]).float() - old
        spectrum = spectrum_of(delta, noise=rounding_of(old, delta))
        place = place_of(f"{name}.{index}")
        yield Changed(f"{name}.{index}", place, tuple(delta.shape), "whole", norm_of(delta), norm_of(old), spectrum)


def _changed(name: str, edit: Edit, head: Iterable[str], originals: Originals | None) -> Changed:
    place, form = place_of(name, head), form_of(name, edit, head)
    if form == "new":
        new = edit(None)
        return Changed(name, place, tuple(new.shape), form, norm_of(new), None, spectrum_of(new))
    if isinstance(edit, AddLowRank):
        return _of_factors(name, place, edit, originals.old(name) if originals is not None else None)
    if originals is None:
        shape = tuple(edit.new.shape) if hasattr(edit, "new") else ()
        return Changed(name, place, shape, form, None, None, None)
    old = originals.old(name)
    delta = originals.delta(name, edit)
    return Changed(
        name,
        place,
        tuple(delta.shape),
        form,
        norm_of(delta),
        norm_of(old),
        spectrum_of(delta, noise=rounding_of(old, delta) if old.shape == delta.shape else 0.0),
    )


def _of_factors(name: str, place: Place, edit: AddLowRank, old: Tensor | None) -> Changed:
    """A low-rank change, measured by its factors."""
    factors = factors_of(edit)
    assert factors is not None
    _, values, _ = lowrank.turned(factors)
    out, features = factors.shape
    shape = (features, out) if edit.transposed else (out, features)
    base = norm_of(old) if old is not None else None
    return Changed(name, place, shape, "low rank", float(values.norm()), base, summed_up(values, max(shape)))


def form_of(name: str, edit: Edit, head: Iterable[str]) -> str:
    """How a tensor was changed; see `Changed.form`."""
    if name in head:
        return "new"
    match edit:
        case AddLowRank() | AddLowRanks():
            return "low rank"
        case MergeLayer():
            return "layer"
        case PutEntries():
            return "entries"
    return "whole"


def idle(edit: Edit | None, norm: float | None) -> bool:
    """Whether this is the bias of a peft layer that only changes the weight: its merge names both."""
    return isinstance(edit, MergeLayer) and edit.part == "bias" and norm == 0.0


def factors_of(edit: Edit) -> Factors | None:
    """A low-rank change as factors, float64, its scale in them, shape (out, in) in every layout; None for others."""
    if not isinstance(edit, AddLowRank):
        return None
    return Factors(edit.down.double(), edit.up.double() * edit.scale)


# ---------------------------------------------------------------------- for people


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3g} %"


def table(title: str, groups: Sequence[Group]) -> list[str]:
    """Groups of changes, a line each."""
    rows = [
        (group.name, str(group.tensors), _number(group.norm), _percent(group.relative), _number(group.effective))
        for group in groups[:SHOWN]
    ]
    more = [f"... and {len(groups) - SHOWN} more"] if len(groups) > SHOWN else []
    return [*aligned((title, "tensors", "norm", "of the backbone", "effective rank"), rows), *more]


def _whole_table(members: Sequence[Changed]) -> list[str]:
    rows = [
        (one.name, one.form, "x".join(map(str, one.shape)), _number(one.norm), _percent(one.relative))
        for one in members
    ]
    return aligned((OUTSIDE, "form", "shape", "norm", "of the backbone"), rows)


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table: the first column to the left, the others to the right."""
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]
