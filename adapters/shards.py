"""A directory of safetensors files: its headers, reads of one tensor at a time, flushed writes, digests.

Reads go through plain file descriptors, not memory maps: the pages of a map count as this process's memory, and
a merge of a model larger than memory must stay small.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, final

from adapters import jsontext
from adapters.errors import FolderError, message

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
CHUNK = 4 << 20  # bytes per read of a tensor that is only looked at
# Bytes per write. A kernel keeps what one write brings in pages as large as it can find, and looks long for large ones:
# on a busy host, writes of 1 MiB and more took five times as long as the same bytes in quarters.
WRITE = 256 << 10
MAX_HEADER = 100 << 20  # bytes; the limit of the safetensors format itself
MAX_INDEX = 64 << 20  # bytes of a shard index
# The format's code -> torch's name and bytes per value.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
NAMES = {dtype: code for code, (dtype, _) in DTYPES.items()}
WIDTHS = dict(DTYPES.values())


@final
@dataclass(frozen=True)
class Slot:
    """Where one tensor lies: file, dtype (torch's name), shape, first byte in the file, length in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """The bytes of a tensor: torch's name of its dtype, and its shape.

    Raises:
        FolderError: a dtype that safetensors files of ours do not hold.
    """
    if dtype not in WIDTHS:
        raise FolderError(message(f"unknown dtype {dtype!r}", expected=f"one of {', '.join(WIDTHS)}"))
    return math.prod(shape) * WIDTHS[dtype]


def foreign(head: bytes) -> str:
    """What stands at a file's place where a download went wrong; empty where its first bytes say nothing of that."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer"
    return "an HTML page" if head.lstrip().lower().startswith((b"<!doctype", b"<html")) else ""


def _refuse_foreign(file: Path, head: bytes) -> None:
    kind = foreign(head)
    if kind:
        raise FolderError(
            message(
                f"this is {kind}, not the file itself",
                where=str(file),
                remedy="Run `git lfs pull`." if "lfs" in kind else "Download the file again.",
            )
        )


def read_json(file: Path, limit: int) -> Any:
    """A JSON file from anywhere, read strictly.

    Args:
        file: the file; a link is refused where the folder is (`places.refuse_strays`).
        limit: bytes that it may have.

    Raises:
        FolderError: no file, too large, a page or pointer in its place, or no JSON that everybody reads alike.
    """
    try:
        if not file.is_file():
            raise FolderError(message("a file is missing", where=str(file)))
        size = file.stat().st_size
        if size > limit:
            raise FolderError(
                message(
                    "a file too large to be what its name says",
                    where=str(file),
                    expected=f"at most {limit:,} bytes",
                    found=f"{size:,}",
                )
            )
        content = file.read_bytes()
    except OSError as fault:
        raise FolderError(message("cannot read a file", where=str(file), found=fault)) from fault
    _refuse_foreign(file, content[:256])
    try:
        return jsontext.parse(content)
    except ValueError as fault:
        raise FolderError(
            message(
                "broken JSON" if content.strip() else "an empty file in the place of JSON",
                where=str(file),
                found=fault,
                remedy="Take the file from its source again.",
            )
        ) from fault


def read_header(file: Path) -> tuple[dict[str, Slot], dict[str, str]]:
    """The tensors of one safetensors file and its metadata, checked against the file's size.

    Raises:
        FolderError: the file is not a whole safetensors file, or says a thing twice.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(256)
            _refuse_foreign(file, head)
            length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else -1
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise FolderError(
                    message(
                        "not a whole safetensors file",
                        where=str(file),
                        expected="a header length that fits the file",
                        found=f"{length} in a file of {size} bytes",
                        remedy="Download or save it again.",
                    )
                )
            stream.seek(8)
            text = stream.read(length)
        if not text.startswith(b"{"):
            raise FolderError(message("a safetensors header that does not begin with {", where=str(file)))
        header: Any = jsontext.parse(text)
    except (OSError, ValueError) as fault:
        if isinstance(fault, FolderError):
            raise
        raise FolderError(message("cannot read the safetensors header", where=str(file), found=str(fault))) from fault
    metadata: Any = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FolderError(message("safetensors metadata that is not text", where=str(file)))
    for name, entry in header.items():
        if not _well_formed(name, entry):
            raise FolderError(message("a broken safetensors entry", where=f"{file}: {name!r}", found=str(entry)[:200]))
    slots: dict[str, Slot] = {}
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, stop = entry["data_offsets"]
        dtype, width = DTYPES[entry["dtype"]]
        if begin != end or stop - begin != width * math.prod(entry["shape"]):
            raise FolderError(message("a broken safetensors entry", where=f"{file}: {name}", found=str(entry)[:200]))
        slots[name] = Slot(file, dtype, tuple(entry["shape"]), 8 + length + begin, stop - begin)
        end = stop
    if 8 + length + end != size:
        raise FolderError(
            message(
                "the safetensors file is truncated or has bytes to spare",
                where=str(file),
                expected=f"{8 + length + end} bytes",
                found=f"{size} bytes",
                remedy="Download or save it again.",
            )
        )
    return slots, metadata


def _well_formed(name: str, entry: Any) -> bool:
    """A name that is no path, and exactly dtype, shape and two offsets of the kinds that they must be."""
    if not is_name(name) or not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return False
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return False
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(number) is int and number >= 0 for number in (*shape, *offsets))


def is_name(name: str) -> bool:
    """Whether a text can be the name of a tensor: words between dots, never a path."""
    return name.isprintable() and not any(mark in name for mark in ("/", "\\", "..")) and bool(name)


def read_directory(folder: Path) -> dict[str, Slot]:
    """Every tensor of a transformers checkpoint folder, by its name on disk; headers only.

    Raises:
        FolderError: no safetensors weights, two sets of them, a shard that is missing, an index that points out of the
            folder, or one that names other tensors than its shards hold.
    """
    index, single = folder / INDEX, folder / WEIGHTS
    if not index.exists():
        if not single.exists():
            raise FolderError(
                message(
                    "no safetensors weights",
                    where=str(folder),
                    expected=f"{WEIGHTS} or {INDEX}",
                    remedy="Save the model with `model.save_pretrained(folder)`, which writes safetensors.",
                )
            )
        return read_header(single)[0]
    document = read_json(index, MAX_INDEX)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise FolderError(message("cannot read the shard index", where=str(index), expected="a weight_map"))
    shards = sorted(set(weight_map.values()))
    if single.exists() and WEIGHTS not in shards:
        raise FolderError(
            message(
                "two sets of weights in one folder",
                where=str(folder),
                found=f"{WEIGHTS} beside {INDEX}",
                remedy="Delete the one that does not belong there.",
            )
        )
    slots: dict[str, Slot] = {}
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not (folder / shard).is_file():
            raise FolderError(
                message(
                    "the shard index names a file that is not in the folder",
                    where=str(index),
                    found=shard,
                    remedy="Download the checkpoint again.",
                )
            )
        found = read_header(folder / shard)[0]
        strays = sorted(name for name in found if weight_map.get(name) != shard)
        if strays:
            raise FolderError(
                message(
                    "a shard holds tensors that the index does not look for in it",
                    where=f"{folder / shard}, {index.name}",
                    found=", ".join(strays[:3]),
                    remedy="Download the checkpoint again.",
                )
            )
        slots.update(found)
    missing = sorted(set(weight_map) - set(slots))
    if missing:
        raise FolderError(message("shards lack tensors of the index", where=str(index), found=", ".join(missing[:3])))
    return slots


def read_bytes(slot: Slot) -> Iterator[memoryview]:
    """The tensor's bytes in chunks; each chunk is valid until the next is asked for."""
    buffer = bytearray(min(CHUNK, max(slot.nbytes, 1)))
    view = memoryview(buffer)
    with slot.file.open("rb", buffering=0) as stream:
        stream.seek(slot.start)
        left = slot.nbytes
        while left:
            got = stream.readinto(view[: min(left, len(buffer))])
            if not got:
                raise FolderError(message("the file ends inside a tensor", where=str(slot.file)))
            yield view[:got]
            left -= got


def read_at(handle: int, into: memoryview, position: int, file: Path) -> None:
    """Fill `into` with a file's bytes from `position` on.

    Raises:
        FolderError: the file ends before.
    """
    done = 0
    while done < len(into):
        got = os.preadv(handle, [into[done:]], position + done)
        if not got:
            raise FolderError(message("the file ends inside a tensor", where=str(file)))
        done += got


def write_at(handle: int, content: memoryview, position: int) -> None:
    """Put all bytes of `content` at `position` of a file; several threads may, at places of their own."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done : done + WRITE], position + done)


def read_tensor(slot: Slot) -> Tensor:
    """One tensor, in its own dtype and layout, in memory of its own."""
    import torch

    raw = torch.empty(slot.nbytes, dtype=torch.uint8)
    view = memoryview(raw.numpy().data)
    with slot.file.open("rb", buffering=0) as stream:
        stream.seek(slot.start)
        position = 0
        while position < slot.nbytes:
            got = stream.readinto(view[position:])
            if not got:
                raise FolderError(message("the file ends inside a tensor", where=str(slot.file)))
            position += got
    dtype: torch.dtype = getattr(torch, slot.dtype)
    return raw.view(dtype).reshape(slot.shape)


def is_stack(name: str, shape: Sequence[int]) -> bool:
    """Whether a tensor is a stack of matrices, one an expert: of three axes, and no module's `weight`.

    A convolution's has three axes, too.
    """
    return len(shape) == 3 and name.rpartition(".")[2] != "weight"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The raw bytes of a tensor, as they stand in a safetensors file."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def header_bytes(entries: Mapping[str, tuple[str, tuple[int, ...], int]], metadata: Mapping[str, str]) -> bytes:
    """The header of a safetensors file whose tensors follow in the order of `entries`: name -> dtype, shape, bytes."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def save_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the modes that the umask asks for, flushed to the disk."""
    entries = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.numel() * tensor.element_size())
        for name, tensor in tensors.items()
    }
    with file.open("xb") as stream:
        stream.write(header_bytes(entries, metadata))
        for tensor in tensors.values():
            stream.write(tensor_bytes(tensor))
        flush(stream)


def flush(stream: BinaryIO) -> None:
    """Hand the written bytes to the disk."""
    stream.flush()
    os.fsync(stream.fileno())


def sha256(file: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(file: Path, text: str) -> None:
    """Write a new text file and flush it to the disk; what stands there already is never written through."""
    with file.open("xb") as stream:
        stream.write(text.encode())
        flush(stream)


def copy(source: Path, target: Path) -> None:
    """A new file with another's bytes, flushed to the disk."""
    with source.open("rb") as old, target.open("xb") as new:
        shutil.copyfileobj(old, new)
        flush(new)


def canonical_json(document: Mapping[str, Any]) -> str:
    """The one text of a JSON document that its digest is taken over."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_of(document: Mapping[str, Any], field: str = "digest") -> str:
    """The sha256 over the canonical JSON of a document without its own digest field."""
    rest = {key: value for key, value in document.items() if key != field}
    return hashlib.sha256(canonical_json(rest).encode()).hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Delete what a writer of ours left: a folder with its content, or a file; a link itself, not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        path.unlink()
