"""Adapters that are to become one: read, held against each other, and whose head the result has.

A head is new where loading made it: two of those have no start in common and cannot be added up. One that the
backbone's checkpoint has already (a masked language model's, a classifier's that trains on) is changed like any tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters import shards
from adapters.anatomy import LinearMap, linear_maps, own_name, owner
from adapters.arithmetic import Method
from adapters.blueprint import drawn
from adapters.changes import Changes, base_folder, originals, read, refuse_apart
from adapters.edits import AddLowRank, Replace
from adapters.errors import RequestError, message
from adapters.injection import candidates
from adapters.mixture import WEIGHT, Mixture
from adapters.shards import Slot
from adapters.storage import task_of


def opened(
    folders: Sequence[str | Path],
    *,
    method: Method,
    density: float,
    scale: float,
    seed: int,
    head: str | Path | None = None,
    base: str | Path | None = None,
) -> Mixture:
    """Read adapters and hold them against each other; only headers of the backbone are read.

    Args:
        folders: of the adapters.
        method, density, scale, seed: of the arithmetic.
        head: which of them gives the head, where several bring one.
        base: the backbone's folder, where it is not the one that they name.

    Raises:
        FolderError: a damaged folder, or no adapter.
        BackboneError: different backbones.
        RequestError: two new heads, different added tokens or storage, a folder that holds its backbone, tensors that
            the result's model class does not have.
    """
    parts = tuple(read(folder) for folder in folders)
    for part in parts:
        if part.document["backbone"].get("inside"):
            raise RequestError(
                message(
                    "the folder holds its backbone inside: it is a merged model and no adapter beside one",
                    where=str(part.folder),
                    remedy="Give the adapter that it was merged from.",
                )
            )
    source = base_folder(parts[0].document, base, str(parts[0].folder))
    slots = shards.read_directory(source) if source.is_dir() else {}
    there = [_pretrained(part, slots) for part in parts]
    like = _like(parts, folders, head, [part.head - set(known) for part, known in zip(parts, there, strict=True)])
    others = [part for part in parts if part is not like]
    refuse_apart(like, others)
    _refuse_grown_apart(like, others)
    names = {name: None for part in others for name in part.inside}
    where = str(like.folder)
    first = originals(like, base)  # says what is wrong with the backbone's folder before anything else is asked of it
    net = drawn(first.folder, task_of(like.document, where), like.document["backbone"]["load"])
    known = {own_name(name) for name, _ in net.model.named_parameters()}
    known |= {own_name(name) for name, _ in net.model.named_buffers()}
    for part in others:
        odd = sorted(set(part.inside) - known) + sorted(set(part.inside) & like.head)
        if odd:
            raise RequestError(
                message(
                    "an adapter changes tensors that the result's model class does not take from the backbone",
                    where=str(part.folder),
                    expected=f"tensors of {like.document['backbone']['model_class']}, the class of {like.folder}",
                    found=", ".join(odd[:3]),
                    remedy="Combine adapters of one model class, or name another head.",
                )
            )
    values = originals(like, base, also=[name for name in names if name not in like.edits])
    shared = {} if head is not None else there[parts.index(like)]
    maps = dict(_maps(net.model, parts, like.head))
    return Mixture(parts, like, values, maps, shared, method, density, scale, seed)


def _pretrained(part: Changes, slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """The tensors of an adapter's head that training began with as the backbone's checkpoint has them.

    The fingerprint leaves heads out, so that name and shape have to do.
    """
    names, new = part.document["backbone"]["names"], set(part.document["new"])
    found = {}
    for name in part.head - new:
        slot, edit = slots.get(names.get(name, name)), part.edits[name]
        if slot is not None and isinstance(edit, Replace) and tuple(edit.new.shape) == slot.shape:
            found[name] = slot
    return found


def _maps(net: Any, parts: Sequence[Changes], head: frozenset[str]) -> Iterator[tuple[str, LinearMap]]:
    """The linear maps inside the blocks, and whatever else low-rank updates stand beside."""
    owners = {owner(name) for name in head}
    yield from ((path, found) for path, found in linear_maps(net).items() if path not in owners)
    known = candidates(net, head)
    for part in parts:
        for name, edit in part.inside.items():
            path = name.removesuffix(WEIGHT)
            if isinstance(edit, AddLowRank) and path in known:
                yield path, known[path]


def _like(
    parts: Sequence[Changes],
    folders: Sequence[str | Path],
    head: str | Path | None,
    new: Sequence[frozenset[str]],
) -> Changes:
    """The adapter whose head the result has; `new` has the tensors of each adapter's head that have no start.

    Raises:
        RequestError: several bring one, or the named one brings none.
    """
    having = " or ".join(str(part.folder) for part in parts if part.head)
    bring = [part for part, names in zip(parts, new, strict=True) if names]
    if head is not None:
        wanted = Path(head).expanduser()
        by_path = [p for p, f in zip(parts, folders, strict=True) if str(f) == str(head) or _same(p.folder, wanted)]
        found = by_path or [part for part in parts if part.folder.name == str(head)]
        if len({part.folder for part in found}) != 1 or not found[0].head:
            raise RequestError(
                message(
                    "no adapter of that name brings a head",
                    where=f"head={str(head)!r}",
                    expected=having or "none: no adapter brings one",
                    remedy="Name one of these." if having else "Leave head out.",
                )
            )
        return found[0]
    others = [part for part in bring[1:] if not _alike(bring[0], part)]
    if others:
        raise RequestError(
            message(
                "two adapters bring a new head each, which cannot be put together",
                where=f"{bring[0].folder}, {others[0].folder}",
                found=", ".join(sorted(bring[0].head)[:2]),
                remedy=f"Say whose head to take: --head {bring[0].folder} (head=... in Python).",
            )
        )
    return bring[0] if bring else parts[0]


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()


def _alike(one: Changes, other: Changes) -> bool:
    """Whether two adapters have one head: the same task, and the same tensors bit for bit."""
    import torch

    if one.head != other.head or one.document["task"] != other.document["task"]:
        return False
    pairs = ((one.edits[name], other.edits[name]) for name in one.head)
    return all(isinstance(a, Replace) and isinstance(b, Replace) and torch.equal(a(None), b(None)) for a, b in pairs)


def _refuse_grown_apart(like: Changes, others: Sequence[Changes]) -> None:
    """Where tokens were added, the same tensors must have trained whole, and the same ones in their new rows alone."""
    for other in others:
        mine, theirs = like.document["vocabulary"], other.document["vocabulary"]
        if mine is None or theirs is None:
            continue
        inside = set(other.inside) | set(like.inside)
        one, two = ({k: v for k, v in entry["whole"].items() if k in inside} for entry in (mine, theirs))
        if one != two or mine["axes"] != theirs["axes"]:
            raise RequestError(
                message(
                    "the added tokens' rows trained alone in one adapter, with all rows in the other",
                    where=f"{like.folder}, {other.folder}",
                    remedy="Combine adapters that were trained alike in this.",
                )
            )
