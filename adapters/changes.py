"""What an adapter did to its backbone: edits from its folder, and the backbone's values, compared as they are read."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, final

from adapters import bars, parts, shards
from adapters.backbones import check_folder, local_folder
from adapters.edits import AddLowRank, AddLowRanks, Edit, PutEntries, Replace
from adapters.errors import AdaptersError, BackboneError, FolderError, RequestError, message
from adapters.fingerprint import Fingerprint, differences
from adapters.manifest import (
    backbone_name,
    fetch,
    finite_tensor,
    read_manifest,
    read_slots,
    read_tensors,
    refuse_gone,
    refuse_infinite,
)
from adapters.parts import Piece
from adapters.places import is_path
from adapters.roundtrip import RoundTrip
from adapters.storage import strategy_of
from adapters.stored import Stored
from adapters.stream import Step, expect, plan, refuse_other
from adapters.vocabulary import all_edits, of_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.shards import Slot

LARGE = 1 << 20  # bytes; trained tensors from here on stay in their file until their edit is applied


@final
@dataclass(frozen=True)
class Changes:
    """An adapter folder as what it does.

    Attributes:
        folder: verified.
        document: its manifest.
        edits: by the backbone's own tensor names; those of the head create their tensors.
    """

    folder: Path
    document: Mapping[str, Any]
    edits: Mapping[str, Edit]

    @property
    def head(self) -> frozenset[str]:
        """The backbone's own names of the tensors that it brings."""
        return frozenset(self.document["head"])

    @property
    def inside(self) -> dict[str, Edit]:
        """The edits of what the backbone itself holds."""
        return {name: edit for name, edit in self.edits.items() if name not in self.head}


def read(folder: str | Path) -> Changes:
    """An adapter folder, every digest checked.

    Raises:
        FolderError: damaged, or not an adapter.
    """
    here = fetch(folder)
    document = read_manifest(here)
    return Changes(here, document, edits_of(document, read_tensors(here, document), str(here)))


def refuse_apart(one: Changes, others: Sequence[Changes]) -> None:
    """Adapters can only be put together where they changed the same backbone, kept and spelt in the same way.

    Raises:
        BackboneError: tensors that both backbones have differ, or an adapter changes one that the first lacks.
        RequestError: other added tokens, another storage of the frozen rest.
    """
    for other in others:
        lines, shared = apart(one, other)
        if lines or not shared:
            told = f"where {len(lines)} of {shared} shared tensors differ: {'; '.join(lines[:3])}"
            raise BackboneError(
                message(
                    "the adapters were trained on different backbones",
                    where=f"{one.folder}, {other.folder}",
                    expected=f"one backbone, as {_named(one)}",
                    found=f"{_named(other)}, {told if lines else 'which has no tensor of the same name'}",
                    remedy="Combine adapters of one backbone; of others each can only be merged alone.",
                )
            )
        for what, wanted, found in unlike(one, other):
            raise RequestError(
                message(
                    f"the adapters differ in their {what}",
                    where=f"{one.folder}, {other.folder}",
                    expected=wanted,
                    found=found,
                    remedy="Combine adapters that were trained alike in this.",
                )
            )


def apart(one: Changes, other: Changes) -> tuple[list[str], int]:
    """Where the backbones of two adapters differ, and how many tensors both have."""
    prints = [Fingerprint.from_json(side.document["backbone"]["fingerprint"]) for side in (one, other)]
    shared = set(prints[0].tensors) & set(prints[1].tensors)
    return differences(*(Fingerprint({n: p.tensors[n] for n in shared}, p.prefix) for p in prints)), len(shared)


def unlike(one: Changes, other: Changes) -> list[tuple[str, str, str]]:
    """What else must be alike of two adapters that are to be put together, and is not: what it is, and both sides."""
    told = (("added tokens", _tokens), ("storage of the frozen weights", _storage))
    found = [(what, say(one.document), say(other.document)) for what, say in told]
    return [entry for entry in found if entry[1] != entry[2]]


def _named(changes: Changes) -> str:
    backbone = changes.document["backbone"]
    return f"{backbone['name'] or backbone['model_class']} ({backbone['fingerprint']['digest'][:12]})"


def _tokens(document: Mapping[str, Any]) -> str:
    entry = document["vocabulary"]
    if entry is None:
        return "none"
    return ", ".join(f"{token!r} as {index}" for token, index in zip(entry["tokens"], entry["ids"], strict=True))


def _storage(document: Mapping[str, Any]) -> str:
    backbone = document["backbone"]
    return f"{backbone['quantization']}, {len(backbone['packed'])} weights" if backbone["packed"] else "as they are"


# ---------------------------------------------------------------------- the backbone's values


@final
@dataclass(frozen=True)
class Originals:
    """The tensors of a backbone on disk that some edits change, each compared with the fingerprint as it is read.

    Attributes:
        folder: of the checkpoint.
        steps: the backbone's own name -> where the tensor lies.
        prints: the fingerprint's.
        stacks: name of a stack of matrices that lies in pieces (experts) -> its pieces in order, and where each is.
    """

    folder: Path
    steps: Mapping[str, Step]
    prints: Mapping[str, Any]
    stacks: Mapping[str, tuple[tuple[Piece, Step], ...]] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor in memory; None where the backbone has none of this name."""
        if name in self.stacks:
            piece, last = self.stacks[name][-1]
            return (piece.entry + 1, piece.stop, *last.shape[1:])
        step = self.steps.get(name)
        return step.source.shape if step is not None and step.source is not None else None

    def is_stack(self, name: str) -> bool:
        """Whether a tensor is a stack of matrices, one an expert."""
        shape = self.shape(name)
        return shape is not None and shards.is_stack(name, shape)

    def entries(self, name: str) -> Iterator[Tensor]:
        """The matrices of a stack one after the other, float32.

        Raises:
            BackboneError: it is not the recorded backbone's.
        """
        if name not in self.stacks:
            self.compare(name)
            whole = Stored(cast("Slot", self.steps[name].source))
            yield from (whole.entry(index).float() for index in range(whole.shape[0]))
            return
        import torch

        for _, group in itertools.groupby(self.stacks[name], key=lambda each: each[0].entry):
            yield torch.cat([self._read(step) for _, step in group]).float()

    def compare(self, name: str) -> None:
        """Read the tensor, some megabytes at a time, for the sake of the fingerprint alone.

        Raises:
            BackboneError: it is not the recorded backbone's.
        """
        import xxhash

        for step in [step for _, step in self.stacks[name]] if name in self.stacks else [self.steps[name]]:
            assert step.source is not None
            refuse_other(step, self.prints)
            digest = xxhash.xxh3_128()
            for chunk in shards.read_bytes(step.source):
                digest.update(chunk)
            expect(step, self.prints, digest.hexdigest())

    def stored(self, name: str) -> Tensor:
        """The tensor as it lies in the checkpoint, in its own dtype.

        Raises:
            BackboneError: it is not the recorded backbone's.
        """
        if name not in self.stacks:
            return self._read(self.steps[name])
        import torch

        rows = torch.cat([self._read(step) for _, step in self.stacks[name]])
        return rows.view(self.stacks[name][-1][0].entry + 1, -1, rows.shape[-1])

    def _read(self, step: Step) -> Tensor:
        import xxhash

        assert step.source is not None
        refuse_other(step, self.prints)
        tensor = shards.read_tensor(step.source)
        expect(step, self.prints, xxhash.xxh3_128_hexdigest(shards.tensor_bytes(tensor)))
        return tensor

    def old(self, name: str) -> Tensor:
        """The tensor as the adapter's training saw it, float32: where it was packed, what 4 bits made of it.

        Raises:
            BackboneError: it is not the recorded backbone's.
        """
        tensor = self.stored(name)
        match self.steps[name].edit if name in self.steps else None:
            case RoundTrip(kind, dtype, transposed, _):
                return RoundTrip(kind, dtype, transposed)(tensor)
        return tensor.float()

    def delta(self, name: str, edit: Edit) -> Tensor:
        """What an edit adds to its tensor, float32, in the tensor's own layout; low-rank edits need no value.

        Entries that were added count from zero.
        """
        if isinstance(edit, AddLowRank | AddLowRanks):
            return edit.delta()
        old = self.old(name)
        new = edit(old)
        if new.shape != old.shape:
            import torch

            room = torch.zeros_like(new)
            room[tuple(map(slice, old.shape))] = old
            old = room
        return new - old  # a new tensor: what the edit returns may be the adapter's own


def originals(changes: Changes, base: str | Path | None = None, also: Collection[str] = ()) -> Originals:
    """The backbone that an adapter changes.

    Args:
        changes: the adapter.
        base: its folder, where it is not the one that the adapter names.
        also: further tensors of the backbone, by its own names, whose values will be asked for.

    Raises:
        RequestError: the backbone is not to be had, or holds tensors in other pieces than memory does.
        BackboneError: it lacks tensors.
    """
    where = str(changes.folder)
    source = base_folder(changes.document, base, where)
    check_folder(source)
    asked: dict[str, Edit] = {**{name: AddNothing() for name in also}, **changes.edits}
    stacks = parts.stacked(asked, changes.document, source)
    wanted = {name: edit for name, edit in asked.items() if name not in stacks}
    pieces: dict[str, Edit] = {piece.name: AddNothing() for each in stacks.values() for piece in each}
    found = parts.on_disk(wanted, changes.document, source)
    if set(found) != set(wanted):
        odd = sorted(set(wanted) - set(found))
        raise RequestError(
            message(
                "the checkpoint holds these tensors in other pieces than memory does",
                where=f"{source}: {', '.join(odd[:3])}",
                remedy="Merge the adapter in memory instead: adapters.merge(adapters.load(folder)).",
            )
        )
    steps = plan(changes.document, found | pieces, shards.read_directory(source), None, str(source))
    by_edit = {id(step.edit.then if isinstance(step.edit, RoundTrip) else step.edit): step for step in steps}
    places = {name: by_edit[id(edit)] for name, edit in wanted.items()}
    prints = changes.document["backbone"]["fingerprint"]["tensors"]
    held = {name: tuple((piece, by_edit[id(pieces[piece.name])]) for piece in each) for name, each in stacks.items()}
    return Originals(source, {name: step for name, step in places.items() if step.source is not None}, prints, held)


@final
@dataclass(frozen=True, eq=False)
class AddNothing:
    """The tensor as it is."""

    def __call__(self, old: Tensor | None) -> Tensor:
        if old is None:
            raise RequestError("a tensor that is left as it is must be in the backbone")
        return old.float()


def base_folder(document: Mapping[str, Any], base: str | Path | None, where: str) -> Path:
    """The folder of an adapter's backbone: the one given, the one named, or the download of a hub id.

    Raises:
        RequestError: neither here nor to be had.
    """
    name = str(base) if base is not None else backbone_name(document, Path(where))
    revision = document["backbone"]["revision"]
    if not name:
        raise RequestError(
            message("the adapter was made on a live model without a name", where=where, remedy="Give base=folder.")
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    place = isinstance(base, Path) or is_path(name) or (base is not None and "/" not in name)
    cached = None if place else local_folder(name, {} if base is not None else {"revision": revision})
    if cached is not None:
        return cached
    if place or base is not None:
        raise RequestError(message("there is no such backbone folder", where=name, remedy="Give base=folder."))
    refuse_gone(document, where)
    from huggingface_hub import snapshot_download

    try:
        with bars.downloading(name):
            return Path(snapshot_download(name, revision=revision or None, tqdm_class=cast("Any", bars.Bar)))
    except Exception as fault:  # the hub client raises a family of its own, and whatever the network raises
        raise RequestError(
            message(
                "the backbone is neither here nor to be had from the hub",
                where=name,
                found=" ".join(str(fault).split())[:200],
                remedy="Give base=folder.",
            )
        ) from fault


def edits_of(document: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Edit]:
    """What the adapter does to its backbone's tensors.

    Raises:
        FolderError: options that its tensors do not bear out.
    """
    try:
        return all_edits(of_manifest(document, where), strategy_of(document, where), tensors)
    except AdaptersError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as fault:
        raise FolderError(
            message(
                "the adapter's tensors are not those of its strategy",
                where=where,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:200],
            )
        ) from fault


def streamed_edits(document: Mapping[str, Any], folder: Path) -> tuple[dict[str, Edit], bool]:
    """The same, with large tensors that only take the old one's place left in the adapter's file.

    Whatever a strategy computes with is in memory; which tensors it hands on as they are is found out with tensors
    that have no values.

    Args:
        document: the verified manifest.
        folder: the adapter's.

    Returns:
        The edits, and whether any tensor stays in the file: then `manifest.refuse_changed` has the last word.

    Raises:
        FolderError: values that are not finite; options that the tensors do not bear out.
    """
    import torch

    where = str(folder)
    slots = read_slots(folder, document)
    ghosts = {
        name: torch.empty(slot.shape, dtype=getattr(torch, slot.dtype), device="meta") for name, slot in slots.items()
    }
    large = {id(ghosts[name]): name for name, slot in slots.items() if slot.nbytes >= LARGE}
    handed: set[str] = set()
    if large:
        try:
            drawn = all_edits(of_manifest(document, where), strategy_of(document, where), ghosts)
            handed = {large[key] for edit in drawn.values() if (key := _values_of(edit)) in large}
        except (AdaptersError, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
            handed = set()  # it looks at values: all of them are read, and a fault is told below
    for name in handed:
        refuse_infinite(slots[name], name)
    tensors = {name: ghosts[name] if name in handed else finite_tensor(slot, name) for name, slot in slots.items()}
    edits = edits_of(document, tensors, where)
    return {name: _from_file(edit, large, handed, slots) for name, edit in edits.items()}, bool(handed)


def _values_of(edit: Edit) -> int:
    """Which object holds the new values of an edit that does nothing but put them in place; 0 for other edits."""
    match edit:
        case Replace(values) | PutEntries(_, values, _, _):
            return id(values)
    return 0


def _from_file(edit: Edit, large: Mapping[int, str], handed: Collection[str], slots: Mapping[str, Any]) -> Edit:
    name = large.get(_values_of(edit))
    if name not in handed or name is None:
        return edit
    match edit:
        case PutEntries(ids, _, axis, size):
            return PutEntries(ids, Stored(slots[name]), axis, size)
    return Replace(Stored(slots[name]))
