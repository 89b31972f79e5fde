"""An adapter folder without what its backbone says already: packed against the backbone, restored bit for bit.

A tensor that took the place of one of the backbone's lies near it: read as whole numbers, their bits differ by a
little. Those differences, small ones first whatever their sign, are divided into their bytes; the high bytes are
mostly zero and shrink, the low ones are noise and stay as they are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import changes, progress, shards
from adapters.changes import Changes, Originals
from adapters.edits import Replace
from adapters.errors import BackboneError, FolderError, message
from adapters.manifest import MANIFEST, PACKED, WEIGHTS, read_manifest
from adapters.storage import strategy_of

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

LEVEL = 6  # of zlib; 9 takes four times as long for less than one percent
HEADER = "header"  # the weights file's own header, to the byte
FORM = "1"


def is_packed(folder: Path) -> bool:
    """Whether a folder is an adapter whose weights were packed against its backbone."""
    return (folder / PACKED).is_file() and (folder / MANIFEST).is_file() and not (folder / WEIGHTS).exists()


def pack(folder: Path, place: Path, base: str | Path | None = None) -> None:
    """Write the packed form of an adapter folder.

    Args:
        folder: an adapter folder; verified.
        place: an existing, empty folder.
        base: the backbone's folder, where it is not the one that the adapter names.

    Raises:
        BackboneError: the base is not the adapter's backbone.
    """
    found = changes.read(folder)
    originals = changes.originals(found, base)
    slots, _ = shards.read_header(folder / WEIGHTS)
    places = _replaced(found, originals)
    pieces: dict[str, Tensor] = {HEADER: _bytes(_head(folder / WEIGHTS, slots))}
    entries = []
    with progress.Job("packing", len(slots), "tensors") as job:
        for number, (key, slot) in enumerate(slots.items()):
            tensor, name = shards.read_tensor(slot), places.get(key, "")
            old = originals.stored(name) if name else None
            for plane, content in enumerate(_planes(_numbers(tensor, old))):
                pieces[f"{number}.{plane}"] = _bytes(_smaller(content))
            dtype = str(old.dtype).removeprefix("torch.") if old is not None else ""
            entries.append({"key": key, "against": name, "dtype": dtype})
            job.advance()
    _copy(folder, place, found.document)
    shards.save_tensors(place / PACKED, pieces, {"holdfast": FORM, "tensors": json.dumps(entries)})


def unpack(folder: Path, place: Path, base: str | Path | None = None) -> None:
    """Restore the adapter folder that was packed; every byte is checked by the digests of its own manifest.

    Args:
        folder: a packed folder.
        place: an existing, empty folder.
        base: the backbone's folder, where it is not the one that the adapter names.

    Raises:
        FolderError: damaged, or from a newer version.
        BackboneError: the base is not the adapter's backbone.
    """
    if not is_packed(folder):
        raise FolderError(message("not a packed adapter", where=str(folder), expected=f"{PACKED} in it"))
    document = read_manifest(folder, packed=True)
    pieces, metadata = shards.read_header(folder / PACKED)
    where = str(folder / PACKED)
    if metadata.get("holdfast") != FORM:
        raise FolderError(
            message("packed by another version", where=where, expected=f"form {FORM}", found=metadata.get("holdfast"))
        )
    entries = _entries(metadata, document, where)
    names = [entry["against"] for entry in entries if entry["against"]]
    originals = changes.originals(Changes(folder, document, {}), base, also=names)
    _copy(folder, place, document)
    with (place / WEIGHTS).open("xb") as stream, progress.Job("unpacking", len(entries), "tensors") as job:
        stream.write(_read(pieces, HEADER, where))
        for number, entry in enumerate(entries):
            described = document["tensors"][entry["key"]]
            planes = [
                _whole(_read(pieces, f"{number}.{plane}", where), shards.nbytes("uint8", described["shape"]), where)
                for plane in range(shards.WIDTHS[described["dtype"]])
            ]
            old = originals.stored(entry["against"]) if entry["against"] else None
            if old is not None and str(old.dtype) != f"torch.{entry['dtype']}":
                raise BackboneError(
                    message(
                        "it was packed against a backbone of another dtype",
                        where=f"{where}: {entry['against']}",
                        expected=entry["dtype"],
                        found=str(old.dtype).removeprefix("torch."),
                        remedy="Give the folder of the backbone that it was packed with.",
                    )
                )
            stream.write(_restored(planes, described["dtype"], old))
            job.advance()
        shards.flush(stream)
    read_manifest(place)


def _entries(metadata: Mapping[str, str], document: Mapping[str, Any], where: str) -> list[dict[str, str]]:
    """What the packed file says of its tensors: exactly those of the manifest, against tensors of the backbone."""
    try:
        entries: Any = json.loads(metadata.get("tensors", ""))
        kinds = [{name: type(value) for name, value in entry.items()} for entry in entries]
        keys = [entry["key"] for entry in entries]
    except (ValueError, TypeError, AttributeError, KeyError):
        raise FolderError(message("a packed file whose list of tensors cannot be read", where=where)) from None
    if any(kind != {"key": str, "against": str, "dtype": str} for kind in kinds):
        raise FolderError(message("a packed file whose list of tensors cannot be read", where=where))
    if sorted(keys) != sorted(document["tensors"]):
        odd = sorted(set(keys) ^ set(document["tensors"]))
        raise FolderError(
            message("the packed file and the manifest name different tensors", where=where, found=", ".join(odd[:3]))
        )
    found: list[dict[str, str]] = entries
    return found


def _replaced(found: Changes, originals: Originals) -> dict[str, str]:
    """Of the tensors that stand in a backbone tensor's place, key in the file -> that tensor's own name."""
    strategy, places = strategy_of(found.document, str(found.folder)), {}
    for name, edit in found.edits.items():
        key = strategy.key(name)
        shape = originals.shape(name)
        if not isinstance(edit, Replace) or shape is None or key not in found.document["tensors"]:
            continue
        if list(shape) == found.document["tensors"][key]["shape"] == list(edit.new.shape):
            places[key] = name
    return places


def _numbers(tensor: Tensor, old: Tensor | None) -> np.ndarray[Any, Any]:
    """The bits as whole numbers: those of the tensor alone, or how far they lie from the old one's, zigzag."""
    import numpy as np

    new = _signed(tensor)
    if old is None:
        return new
    difference = new - _signed(old.to(tensor.dtype))  # wraps, and wraps back
    numbers: np.ndarray[Any, Any] = np.bitwise_xor(difference << 1, difference >> (8 * difference.itemsize - 1))
    return numbers


def _signed(tensor: Tensor) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.frombuffer(shards.tensor_bytes(tensor), dtype=f"<i{tensor.element_size()}")


def _planes(numbers: np.ndarray[Any, Any]) -> list[bytes]:
    """Byte 0 of every number, then byte 1 of every number, and so on."""
    import numpy as np

    width = numbers.itemsize
    divided = np.ascontiguousarray(numbers).view(np.uint8).reshape(-1, width)
    return [divided[:, plane].tobytes() for plane in range(width)]


def _restored(planes: list[bytes], dtype: str, old: Tensor | None) -> bytes:
    import numpy as np
    import torch

    width = len(planes)
    divided = np.empty((len(planes[0]), width), dtype=np.uint8)
    for plane, content in enumerate(planes):
        divided[:, plane] = np.frombuffer(content, dtype=np.uint8)
    numbers = divided.reshape(-1).view(f"<i{width}")
    if old is None:
        return numbers.tobytes()
    unsigned = numbers.view(f"<u{width}")
    difference = np.bitwise_xor(unsigned >> 1, -(unsigned & 1)).view(f"<i{width}")
    return bytes((difference + _signed(old.to(getattr(torch, dtype)))).tobytes())


def _smaller(content: bytes) -> bytes:
    packed = zlib.compress(content, LEVEL)
    return packed if len(packed) < len(content) else content


def _whole(content: bytes, size: int, where: str) -> bytes:
    """What `_smaller` made smaller, of a known size; no more than that is ever unpacked.

    Raises:
        FolderError: it is not.
    """
    if len(content) == size:
        return content
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(content, size + 1)
    except zlib.error as fault:
        raise FolderError(message("a packed tensor that is damaged", where=where, found=fault)) from fault
    if len(found) != size or not reader.eof or reader.unused_data:
        raise FolderError(message("a packed tensor that is damaged", where=where, expected=f"{size} bytes"))
    return found


def _bytes(content: bytes) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def _read(pieces: Mapping[str, shards.Slot], name: str, where: str) -> bytes:
    if name not in pieces or pieces[name].dtype != "uint8":
        raise FolderError(message("a packed file that lacks a piece", where=where, found=name))
    return b"".join(bytes(chunk) for chunk in shards.read_bytes(pieces[name]))


def _head(file: Path, slots: Mapping[str, shards.Slot]) -> bytes:
    """The bytes of a safetensors file before its first tensor."""
    with file.open("rb") as stream:
        return stream.read(min(slot.start for slot in slots.values()))


def _copy(folder: Path, place: Path, document: Mapping[str, Any]) -> None:
    """Every file but the weights: those that the manifest lists, the manifest, and what people may edit."""
    beside = [file.name for file in sorted(folder.iterdir()) if file.is_file() and file.name not in (WEIGHTS, PACKED)]
    for name in dict.fromkeys([*document["files"], *beside]):
        if name != WEIGHTS and name != MANIFEST:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shards.copy(folder / name, place / name)
    shards.copy(folder / MANIFEST, place / MANIFEST)
