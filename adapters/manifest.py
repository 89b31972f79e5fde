"""Reading an adapter folder: manifest and tensors, every digest checked; no model, and no torch for the facts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import shards
from adapters.errors import BackboneError, FolderError, message

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.fingerprint import Fingerprint

FORMAT = 1
MANIFEST = "adapter.json"
WEIGHTS = "adapter_model.safetensors"
RECIPE = "run.yaml"
CARD = "README.md"
EDITABLE = {MANIFEST, RECIPE, CARD}  # people edit these; the manifest has a digest of its own
MAX_MANIFEST = 64 << 20  # bytes


def read_manifest(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of an adapter folder, checked; imports no torch.

    Args:
        folder: an adapter folder.
        digests: also check the size and sha256 of every file.

    Raises:
        FolderError: not an adapter folder, an edited manifest, a file that is missing, truncated or changed, a
            newer format.
    """
    file = folder / MANIFEST
    if not file.is_file() or file.is_symlink():
        found = sorted(entry.name for entry in folder.iterdir())[:5] if folder.is_dir() else []
        raise FolderError(
            message(
                "not an adapter folder",
                where=str(folder),
                expected=f"{MANIFEST} in it",
                found=(", ".join(found) or "an empty folder") if folder.is_dir() else "no such folder",
                remedy="Give a folder that adapters.save or `adapters train` wrote.",
            )
        )
    if file.stat().st_size > MAX_MANIFEST:
        raise FolderError(message("the manifest is too large to be one", where=str(file)))
    try:
        document: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise FolderError(message("the manifest is broken", where=str(file), found=fault)) from fault
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise FolderError(message("not a manifest of ours", where=str(file), expected='a JSON object with "format"'))
    if document["format"] > FORMAT:
        raise FolderError(
            message(
                "the adapter was written by a newer version",
                where=str(file),
                expected=f"format {FORMAT} or older",
                found=f"format {document['format']}, holdfast {document.get('holdfast')}",
                remedy="Upgrade: pip install -U holdfast.",
            )
        )
    if document.get("digest") != shards.digest_of(document):
        raise FolderError(
            message(
                "the manifest was edited or damaged",
                where=str(file),
                expected=f"digest {document.get('digest')}",
                found=shards.digest_of(document),
                remedy="Take the folder from its source again.",
            )
        )
    if digests:
        _check_files(folder, document)
    return document


def _check_files(folder: Path, document: Mapping[str, Any]) -> None:
    for name, entry in document["files"].items():
        file = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or file.is_symlink():
            raise FolderError(message("a file outside the folder, or a link", where=f"{folder}: {name}"))
        if not file.is_file():
            raise FolderError(message("a file is missing", where=str(file)))
        size = file.stat().st_size
        if size != entry["size"]:
            raise FolderError(
                message(
                    "a file was truncated or changed",
                    where=str(file),
                    expected=f"{entry['size']} bytes",
                    found=f"{size} bytes",
                    remedy="Take the folder from its source again.",
                )
            )
        if shards.sha256(file) != entry["sha256"]:
            raise FolderError(
                message(
                    "a file was changed",
                    where=f"{file}{_changed_tensor(file, document)}",
                    expected=f"sha256 {entry['sha256'][:16]}...",
                    remedy="Take the folder from its source again.",
                )
            )
    extra = {p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".safetensors")} - set(
        document["files"]
    )
    unknown = extra - {"optimizer.pt", "scheduler.pt", "scaler.pt"} - {p for p in extra if p.startswith("rng_state")}
    if unknown:
        raise FolderError(
            message("tensor files that the manifest does not know", where=str(folder), found=", ".join(sorted(unknown)))
        )


def _changed_tensor(file: Path, document: Mapping[str, Any]) -> str:
    """Which tensor of a damaged weights file changed, where that can be told."""
    if file.name != WEIGHTS:
        return ""
    try:
        slots, _ = shards.read_header(file)
    except FolderError:
        return ""
    for name, slot in slots.items():
        digest = hashlib.sha256()
        for chunk in shards.read_bytes(slot):
            digest.update(chunk)
        if digest.hexdigest() != document["tensors"].get(name, {}).get("sha256"):
            return f": tensor {name}"
    return ""


def read_tensors(folder: Path, document: Mapping[str, Any]) -> dict[str, Tensor]:
    """The trained tensors of a verified folder, exactly those of the manifest, finite.

    Raises:
        FolderError: missing or unexpected tensors, other shapes or dtypes, values that are not finite.
    """
    import torch

    slots, _ = shards.read_header(folder / WEIGHTS)
    odd = sorted(set(slots) ^ set(document["tensors"]))
    if odd:
        raise FolderError(
            message(
                "the weights file and the manifest name different tensors",
                where=str(folder / WEIGHTS),
                found=", ".join(odd[:3]),
            )
        )
    tensors = {}
    for name, entry in document["tensors"].items():
        slot = slots[name]
        if list(slot.shape) != entry["shape"] or slot.dtype != entry["dtype"]:
            raise FolderError(
                message(
                    "a tensor of another shape or dtype",
                    where=f"{folder / WEIGHTS}: {name}",
                    expected=f"{entry['dtype']} {entry['shape']}",
                    found=f"{slot.dtype} {list(slot.shape)}",
                )
            )
        tensors[name] = shards.read_tensor(slot)
        if not bool(torch.isfinite(tensors[name]).all()):
            raise FolderError(message("a tensor with values that are not finite", where=f"{folder / WEIGHTS}: {name}"))
    return tensors


def refuse_other_backbone(document: Mapping[str, Any], found: Fingerprint, where: str) -> None:
    """Compare the backbone at hand with the one that a manifest records.

    Raises:
        BackboneError: naming the tensors that differ.
    """
    from adapters.fingerprint import Fingerprint, differences

    lines = differences(Fingerprint.from_json(document["backbone"]["fingerprint"]), found)
    if lines:
        total = len(document["backbone"]["fingerprint"]["tensors"])
        raise BackboneError(
            message(
                "this is not the backbone that the adapter was trained on",
                where=where,
                expected=f"{document['backbone']['name'] or document['backbone']['model_class']}, "
                f"fingerprint {document['backbone']['fingerprint']['digest'][:12]}",
                found=f"{found.digest[:12]}, where {len(lines)} of {total} tensors differ: {'; '.join(lines[:3])}",
                remedy="Give the right backbone, or verify='off' if you know better.",
            )
        )


def fetch(folder_or_id: str | Path) -> Path:
    """The local folder of an adapter: the folder itself, or the download of a hub id.

    Raises:
        FolderError: neither a folder nor an id that opens.
    """
    path = Path(folder_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(folder_or_id)
    if isinstance(folder_or_id, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith("/"):
        raise FolderError(message("there is no such adapter folder", where=name))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as fault:
        raise FolderError(
            message(
                "neither an adapter folder nor a hub id that opens",
                where=name,
                found=" ".join(str(fault).split())[:200],
            )
        ) from fault
