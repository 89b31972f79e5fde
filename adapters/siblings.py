"""Two checkpoints of one architecture, tensor by tensor, a few at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from adapters import heatmap, shards
from adapters.errors import RequestError, message
from adapters.manifest import MANIFEST
from adapters.profile import Place, aligned, cells, order_of, place_of
from adapters.progress import Job
from adapters.spectra import norm_of
from adapters.stored import Stored

SHOWN = 40  # tensors that people are shown


@final
@dataclass(frozen=True)
class Tensor:
    """A tensor that differs.

    Attributes:
        name: on disk.
        place: in the model.
        a, b: its Frobenius norm in each.
        difference: norm of the difference; None where the shapes differ.
    """

    name: str
    place: Place
    a: float
    b: float
    difference: float | None

    @property
    def relative(self) -> float | None:
        """The difference as a share of A's norm."""
        return self.difference / self.a if self.difference is not None and self.a else None


@final
@dataclass(frozen=True)
class Checkpoints:
    """Two transformers folders side by side.

    Attributes:
        a, b: the folders.
        alike: tensors with the same bytes.
        tensors: those that differ.
        only_a, only_b: names that one of them has alone.
    """

    a: str
    b: str
    alike: int
    tensors: tuple[Tensor, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether every tensor is the same, bit for bit."""
        return not self.tensors and not self.only_a and not self.only_b

    def picture(self, file: str | Path) -> Path:
        """Draw the difference as a share of A, block by kind of module.

        Raises:
            RequestError: neither .png nor .svg, no such folder, nothing differs.
            MissingPackageError: matplotlib is not installed.
        """
        known = [(one.name, one.place, one.relative) for one in self.tensors if one.relative is not None]
        return heatmap.draw(
            *cells(known),
            file,
            title=f"A: {Path(self.a).name}    B: {Path(self.b).name}\nwhat differs",
            scale=heatmap.Scale("difference, share of A's tensor", percent=True),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON takes it."""
        tensors = [{**asdict(one), "relative": one.relative} for one in self.tensors]
        return {**asdict(self), "tensors": tensors, "same": self.same}

    def lines(self) -> list[str]:
        """A table for people, the greatest change first."""
        found = [f"A         {self.a}", f"B         {self.b}"]
        if self.same:
            return [*found, f"the same, bit for bit: all {self.alike} tensors"]
        found.append(f"tensors   {self.alike} alike, {len(self.tensors)} differ")
        for who, names in (("A", self.only_a), ("B", self.only_b)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                found.append(f"only in {who} {', '.join(names[:5])}{more}")
        order = sorted(self.tensors, key=lambda one: -(one.relative if one.relative is not None else math.inf))
        rows = [
            (
                one.name,
                f"{one.a:.3g}",
                f"{one.b:.3g}",
                "other shape" if one.difference is None else f"{one.difference:.3g}",
                "-" if one.relative is None else f"{100 * one.relative:.3g} %",
            )
            for one in order[:SHOWN]
        ]
        found += ["", *aligned(("differ", "|A|", "|B|", "|A - B|", "of A"), rows)] if rows else []
        return found + ([f"... and {len(order) - SHOWN} more"] if len(order) > SHOWN else [])


def is_checkpoint(folder: str | Path) -> bool:
    """Whether this is a folder with a transformers model in it, not an adapter."""
    place = Path(folder).expanduser()
    return (
        place.is_dir()
        and not (place / MANIFEST).is_file()
        and any((place / name).is_file() for name in (shards.WEIGHTS, shards.INDEX))
    )


def compare(a: Path, b: Path) -> Checkpoints:
    """Every tensor of two checkpoints by their names on disk, two in memory at a time.

    Raises:
        FolderError: a checkpoint is damaged.
        RequestError: they have no tensor in common.
    """
    one, two = (shards.read_directory(Path(folder).expanduser()) for folder in (a, b))
    shared = sorted(set(one) & set(two), key=lambda name: (order_of(place_of(name)), name))
    if not shared:
        raise RequestError(
            message(
                "the checkpoints have no tensor in common",
                where=f"{a}, {b}",
                found=f"{next(iter(one), 'nothing')} and {next(iter(two), 'nothing')}",
                remedy="Give two checkpoints of one architecture, both with a head or both without.",
            )
        )
    alike, tensors = 0, []
    with Job("comparing checkpoints", len(shared), "tensors") as job:
        for name in shared:
            for each, *slots in _members(name, one[name], two[name]):
                if (slots[0].dtype, slots[0].shape) == (slots[1].dtype, slots[1].shape) and _equal(*slots):
                    alike += 1
                    continue
                old, new = (shards.read_tensor(slot).double() for slot in slots)
                gap = norm_of(new - old) if old.shape == new.shape else None
                tensors.append(Tensor(each, place_of(each), norm_of(old), norm_of(new), gap))
            job.advance(1)
    only = [tuple(sorted(set(x) - set(y))) for x, y in ((one, two), (two, one))]
    return Checkpoints(str(a), str(b), alike, tuple(tensors), only[0], only[1])


def _members(name: str, one: shards.Slot, two: shards.Slot) -> Iterator[tuple[str, shards.Slot, shards.Slot]]:
    """A tensor of both; a stack of experts as its matrices, each as `name.number`."""
    if one.shape != two.shape or not shards.is_stack(name, one.shape):
        yield name, one, two
        return
    for index in range(one.shape[0]):
        yield f"{name}.{index}", Stored(one).entry(index).slot, Stored(two).entry(index).slot


def _equal(one: shards.Slot, two: shards.Slot) -> bool:
    """Whether two tensors have the same bytes."""
    return all(x == y for x, y in zip(shards.read_bytes(one), shards.read_bytes(two), strict=True))
