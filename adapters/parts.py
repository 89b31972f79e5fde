"""Trained tensors that a checkpoint holds in other pieces than memory does: Mixtral's fused experts.

In memory the experts of a block are a stack of matrices; on disk each matrix lies by itself, or in several parts. What
an edit does to a stack it does to each part of it, so that a part can be read, edited and written without the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters.arithmetic import Fused
from adapters.edits import AddLowRanks, Blend, Edit, Replace, replace_all
from adapters.errors import RequestError, message
from adapters.stored import Stacked, Stored

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Values


@final
@dataclass(frozen=True)
class Piece:
    """A part of a stack that a checkpoint holds by itself.

    Attributes:
        name: on disk.
        entry: which of the stack's matrices it belongs to.
        start, stop: its rows of that matrix.
    """

    name: str
    entry: int
    start: int
    stop: int


def on_disk(edits: Mapping[str, Edit], document: Mapping[str, Any], source: Path) -> dict[str, Edit]:
    """The edits by names that the checkpoint knows; those of stacks are divided into edits of their pieces.

    Only where a tensor has no counterpart of its own on disk is the model class asked, on the meta device. Whole
    trained tensors that are no stacks, or are transposed on the way, are divided as transformers saves them.

    Args:
        edits: by the names in memory.
        document: the adapter's manifest.
        source: the backbone's folder.

    Raises:
        RequestError: an edit that needs the old value of a tensor that is not on disk as it is in memory, and cannot be
            divided.
    """
    apart = {name: edits[name] for name in _apart(edits, document)}
    if not apart:
        return dict(edits)
    from transformers.core_model_loading import revert_weight_conversion

    model = _model(document, source)
    found = {name: edit for name, edit in edits.items() if name not in apart}
    for name, pieces in divided(model, _shapes(model, apart)).items():
        portions = {piece.name: _portion(apart[name], piece) for piece in pieces}
        known = {disk: edit for disk, edit in portions.items() if edit is not None}
        if len(known) == len(portions):
            found |= known
            del apart[name]
    try:
        tensors = {name: edit(None) for name, edit in apart.items()}
    except RequestError as fault:
        raise RequestError(
            message(
                "the checkpoint holds these tensors in other pieces than memory does",
                where=", ".join(sorted(apart)[:3]),
                remedy="Merge in memory: adapters.merge(adapters.load(folder)).save_pretrained(output).",
            )
        ) from fault
    if not tensors:
        return found
    saved = revert_weight_conversion(model, tensors)
    return found | replace_all({name: tensor.contiguous() for name, tensor in saved.items()})


def stacked(names: Iterable[str], document: Mapping[str, Any], source: Path) -> dict[str, tuple[Piece, ...]]:
    """Of tensors by their names in memory, the stacks that the checkpoint holds in pieces, in the order of their rows.

    Args:
        names: in memory.
        document, source: as for `on_disk`.
    """
    apart = _apart(names, document)
    if not apart:
        return {}
    model = _model(document, source)
    return divided(model, _shapes(model, apart))


def divided(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Piece, ...]]:
    """How transformers divides stacks when it saves them: each of its rows is numbered and followed.

    Args:
        model: whose class says how; its weights are not looked at.
        shapes: of tensors of three axes, by their names in memory.

    Returns:
        The pieces of each, in the order of the rows; what is transposed, interleaved or stays one tensor is left out.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    codes, starts, at = {}, {}, 0
    for name, (entries, rows, *_) in shapes.items():
        codes[name], starts[name] = torch.arange(at, at + entries * rows).view(entries, rows, 1), at
        at += entries * rows
    found: dict[str, list[Piece]] = {name: [] for name in shapes}
    odd = set()
    for disk, code in revert_weight_conversion(model, codes).items() if shapes else ():
        flat = code.flatten()
        first, count = int(flat[0]), flat.numel()
        name = max((name for name, start in starts.items() if start <= first), key=lambda each: starts[each])
        entry, start = divmod(first - starts[name], shapes[name][1])
        if start + count > shapes[name][1] or not torch.equal(flat, torch.arange(first, first + count)):
            odd.add(name)
        found[name].append(Piece(disk, entry, start, start + count))
    return {
        name: tuple(sorted(pieces, key=lambda piece: (piece.entry, piece.start)))
        for name, pieces in found.items()
        if name not in odd and sum(piece.stop - piece.start for piece in pieces) == shapes[name][0] * shapes[name][1]
    }


def _apart(names: Iterable[str], document: Mapping[str, Any]) -> list[str]:
    """The tensors that have no counterpart of their own on disk."""
    backbone = document["backbone"]
    prefix = backbone["fingerprint"]["prefix"]
    known = set(backbone["fingerprint"]["tensors"]) | set(document["head"])
    return [
        name
        for name in names
        if name not in backbone["names"] and name not in known and name.removeprefix(f"{prefix}.") not in known
    ]


def _model(document: Mapping[str, Any], source: Path) -> PreTrainedModel:
    """The adapter's model class on the meta device."""
    import torch
    import transformers

    backbone = document["backbone"]
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind = getattr(transformers, backbone["model_class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise RequestError(
            message("transformers has no such model class", where="backbone", found=backbone["model_class"])
        )
    with torch.device("meta"):
        model: PreTrainedModel = kind(config)
    return model


def _shapes(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Of these parameters the shapes of those with three axes."""
    wanted = set(names)
    return {name: tuple(p.shape) for name, p in model.named_parameters() if name in wanted and p.ndim == 3}


def _portion(edit: Edit, piece: Piece) -> Edit | None:
    """What an edit of a stack does to one piece of it; None where it needs more than that."""
    match edit:
        case Replace(new):
            return Replace(rows_of(new, piece.entry, piece.start, piece.stop))
        case AddLowRanks():
            return edit.rows(piece.entry, piece.start, piece.stop)
        case Blend(edits):
            divided = [(weight, _portion(part, piece)) for weight, part in edits]
            whole = [(weight, part) for weight, part in divided if part is not None]
            return Blend(whole) if len(whole) == len(divided) else None
        case Fused(edits=edits, matrices=matrices):
            found = [m for m in matrices if (m.entry, m.start, m.stop) == (piece.entry, piece.start, piece.stop)]
            portions = [portion for _, part, _ in edits if (portion := _portion(part, piece)) is not None]
            return edit.alone(found[0], portions) if found and len(portions) == len(edits) else None
    return None


def delta_of(edit: Edit, entry: int, old: Tensor) -> Tensor | None:
    """What an edit of a stack adds to one of its matrices, float32; None where that takes the whole stack."""
    match edit:
        case Replace(new):
            return rows_of(new, entry, 0, old.shape[0]).float() - old
        case AddLowRanks():
            return edit.entry(entry).delta()
    return None


def rows_of(values: Values, entry: int, start: int, stop: int) -> Values:
    """Some rows of one matrix of a stack, wherever its values are; nothing is read here that need not be."""
    if isinstance(values, Stored):
        return values.entry(entry)[start:stop]
    return values.rows(entry, start, stop) if isinstance(values, Stacked) else values[entry][start:stop]
