"""Reading an adapter folder: manifest and tensors, every digest checked; no model, and no torch for the facts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters import bars, places, schema, shards
from adapters.errors import BackboneError, FolderError, RequestError, message

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.fingerprint import Fingerprint

FORMAT = 1
MANIFEST = "adapter.json"
WEIGHTS = "adapter_model.safetensors"
PACKED = "adapter_model.packed"  # what stands in the weights' place where a folder was packed
RECIPE = "run.yaml"
RUN_MARK = "# adapters run"  # the first line of the recipe of a run that has not finished
CARD = "README.md"
EDITABLE = {MANIFEST, RECIPE, CARD}  # people edit these; the manifest has a digest of its own
OURS = "Give a folder that adapters.save or `adapters train` wrote."
PLAIN = "It is plain peft's: `adapters extract FOLDER --base BASE -o OUT` makes one of ours of it."
PIECE = 4 << 20  # bytes of a tensor at a time, where it stays in its file
MAX_MANIFEST = 64 << 20  # bytes
MAX_SETTINGS = 16 << 20  # bytes of any other JSON file but a vocabulary
MAX_VOCABULARY = 1 << 30  # bytes of a tokenizer's own files
VOCABULARIES = {"tokenizer.json", "vocab.json"}  # read by their tokenizers, whose format is their own
# What a checkpoint holds beside an adapter; never read with an adapter, and verified by its own digests before use.
BEST = "best"  # folder in a checkpoint: the best weights so far, where no checkpoint of their own holds them
OF_CHECKPOINTS = {"optimizer.pt", "scheduler.pt", "scaler.pt", "training_args.bin", f"{BEST}/{WEIGHTS}"}


def read_manifest(folder: Path, *, packed: bool = False) -> dict[str, Any]:
    """The manifest of an adapter folder, every field checked, and every file by size and sha256; imports no torch.

    Args:
        folder: the folder.
        packed: its weights are packed, and are left to whoever unpacks them.

    Raises:
        FolderError: not an adapter folder, an edited manifest, a field that is unknown or out of range, a file that is
            missing, truncated, changed or a link, code or pickles, a newer format.
    """
    file = folder / MANIFEST
    if not file.is_file() and not file.is_symlink():
        found = sorted(entry.name for entry in folder.iterdir())[:5] if folder.is_dir() else []
        raise FolderError(
            message(
                "not an adapter folder",
                where=str(folder),
                expected=f"{MANIFEST} in it",
                found=(", ".join(found) or "an empty folder") if folder.is_dir() else "no such folder",
                remedy=PLAIN if "adapter_config.json" in found else OURS,
            )
        )
    places.refuse_strays(folder, deep=True)
    document: Any = shards.read_json(file, MAX_MANIFEST)
    if not isinstance(document, dict) or type(document.get("format")) is not int:
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
    lines = schema.faults(document)
    if not lines and WEIGHTS not in document["files"]:
        lines = [f"files: no {WEIGHTS}"]
    if lines:
        raise FolderError(
            message(
                "a manifest that no version of ours writes",
                where=str(file),
                found="; ".join(lines[:3]),
                remedy="Take the folder from whom you trust.",
            )
        )
    _check_files(folder, document, left_out={WEIGHTS} if packed else set())
    return document


def seal(folder: Path, document: dict[str, Any]) -> None:
    """Write the manifest of a folder whose other files are all there, with their digests and its own; read it back.

    Args:
        folder: the staged folder.
        document: all fields but "files" and "digest", which are filled in.
    """
    document["files"] = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": shards.sha256(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.relative_to(folder).as_posix() not in EDITABLE
    }
    document["digest"] = shards.digest_of(document)
    shards.write_text(folder / MANIFEST, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    read_manifest(folder)


def _check_files(folder: Path, document: Mapping[str, Any], left_out: Collection[str]) -> None:
    for name, entry in document["files"].items():
        file = folder / name
        if name in left_out:
            continue
        if not file.is_file():
            remedy = "It is packed: `adapters extract --as delta` unpacks it." if (folder / PACKED).is_file() else ""
            raise FolderError(message("a file is missing", where=str(file), remedy=remedy))
        if (size := file.stat().st_size) != entry["size"]:
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
        if name != WEIGHTS and not (_inside(name, document) and file.suffix == ".safetensors"):
            check_settings(file)
    refuse_code(folder, known=set(document["files"]))
    _check_inside(folder, document)


def _inside(name: str, document: Mapping[str, Any]) -> bool:
    """Whether a file belongs to the backbone that lies in the folder."""
    backbone = document["backbone"]
    return bool(backbone.get("inside")) and name.startswith(f"{backbone['name']}/")


def _check_inside(folder: Path, document: Mapping[str, Any]) -> None:
    """A backbone in the folder consists of the files that the manifest lists, a config and weights among them."""
    if not document["backbone"].get("inside"):
        return
    place = document["backbone"]["name"]
    listed = {name for name in document["files"] if _inside(name, document)}
    there = {file.relative_to(folder).as_posix() for file in (folder / place).rglob("*") if file.is_file()}
    needed = {f"{place}/config.json"}
    if there != listed or not needed <= listed or not any(name.endswith(".safetensors") for name in listed):
        odd = sorted(there ^ listed) or [f"{place}/config.json"]
        raise FolderError(
            message(
                "the backbone in the folder is not the one that the manifest lists",
                where=str(folder / place),
                found=", ".join(odd[:3]),
                remedy="Take the folder from its source again.",
            )
        )


def backbone_name(document: Mapping[str, Any], folder: Path) -> str | None:
    """The backbone's id or folder; one that lies in the adapter's folder moves with it."""
    backbone = document["backbone"]
    name: str | None = str(folder.absolute() / backbone["name"]) if backbone.get("inside") else backbone["name"]
    return name


def is_standalone(folder: Path) -> bool:
    """Whether a folder holds a backbone with its head beside it, by what its manifest claims."""
    file = folder / MANIFEST
    if not file.is_file() or file.is_symlink():
        return False
    try:
        document: Any = shards.read_json(file, MAX_MANIFEST)
    except FolderError:
        return False
    backbone = document.get("backbone") if isinstance(document, dict) else None
    return isinstance(backbone, dict) and backbone.get("inside") is True


def check_settings(file: Path) -> None:
    """Look at a file of an adapter's processor before any library reads it.

    Raises:
        FolderError: too large, JSON that two readers could read in two ways, or settings that name code to be run.
    """
    if file.suffix != ".json" or file.name in VOCABULARIES:
        if file.stat().st_size > MAX_VOCABULARY:
            raise FolderError(message("a file too large to be a tokenizer's", where=str(file)))
        return
    if names_code(shards.read_json(file, MAX_SETTINGS)):
        raise FolderError(
            message(
                "settings that name code to be run",
                where=str(file),
                found="auto_map",
                remedy="An adapter is data. Load the processor yourself if you trust its code.",
            )
        )


def names_code(settings: Any) -> bool:
    """Whether settings name a class of their own to be fetched and run."""
    if isinstance(settings, dict):
        return "auto_map" in settings or any(names_code(value) for value in settings.values())
    return isinstance(settings, list) and any(names_code(value) for value in settings)


def refuse_code(folder: Path, known: Collection[str]) -> None:
    """Refuse pickles, code, and tensors that nobody vouches for.

    Args:
        folder: an adapter folder.
        known: the files that its manifest lists.

    Raises:
        FolderError: naming them.
    """
    odd = []
    for entry in sorted(folder.rglob("*")):
        name = entry.relative_to(folder).as_posix()
        suffix = entry.suffix.lower()
        if name in OF_CHECKPOINTS or (name.startswith("rng_state") and suffix == ".pth") or not entry.is_file():
            continue
        if suffix in schema.REFUSED_SUFFIXES or (suffix == ".safetensors" and name not in known):
            odd.append(name)
    if odd:
        raise FolderError(
            message(
                "files that may hold code, or tensors that the manifest does not know",
                where=str(folder),
                found=", ".join(odd[:5]),
                remedy="Delete them if they are yours; an adapter does not need them.",
            )
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
    return {name: finite_tensor(slot, name) for name, slot in read_slots(folder, document).items()}


def read_slots(folder: Path, document: Mapping[str, Any]) -> dict[str, shards.Slot]:
    """Where the trained tensors of a verified folder lie, exactly those of the manifest.

    Raises:
        FolderError: missing or unexpected tensors, other shapes or dtypes.
    """
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
    return {name: slots[name] for name in document["tensors"]}


def finite_tensor(slot: shards.Slot, name: str) -> Tensor:
    """A trained tensor from its file.

    Raises:
        FolderError: values that are not finite.
    """
    import torch

    tensor = shards.read_tensor(slot)
    if not bool(torch.isfinite(tensor).all()):
        raise _not_finite(slot, name)
    return tensor


def refuse_infinite(slot: shards.Slot, name: str) -> None:
    """The same for a tensor that is to stay in its file: a piece at a time.

    Raises:
        FolderError: values that are not finite.
    """
    import torch

    dtype: torch.dtype = getattr(torch, slot.dtype)
    if not dtype.is_floating_point:
        return
    raw = torch.empty(min(PIECE, slot.nbytes), dtype=torch.uint8)  # a power of two: no value is divided
    view = memoryview(raw.numpy().data)
    with slot.file.open("rb", buffering=0) as stream:
        for start in range(0, slot.nbytes, PIECE):
            length = min(PIECE, slot.nbytes - start)
            shards.read_at(stream.fileno(), view[:length], slot.start + start, slot.file)
            if not bool(torch.isfinite(raw[:length].view(dtype)).all()):
                raise _not_finite(slot, name)


def _not_finite(slot: shards.Slot, name: str) -> FolderError:
    return FolderError(message("a tensor with values that are not finite", where=f"{slot.file}: {name}"))


def refuse_changed(folder: Path, document: Mapping[str, Any]) -> None:
    """The weights file is still the one that was verified, after tensors were read from it one by one.

    Raises:
        FolderError: it was changed meanwhile.
    """
    file = folder / WEIGHTS
    if shards.sha256(file) != document["files"][WEIGHTS]["sha256"]:
        raise FolderError(
            message(
                "a file was changed while it was read", where=str(file), remedy="Try again when nobody writes there."
            )
        )


def refuse_other_backbone(document: Mapping[str, Any], found: Fingerprint, where: str) -> None:
    """Compare the backbone at hand with the one that a manifest records.

    Raises:
        BackboneError: naming the tensors that differ.
    """
    from adapters.fingerprint import Fingerprint, differences

    recorded = Fingerprint.from_json(document["backbone"]["fingerprint"])
    if recorded.digest != document["backbone"]["fingerprint"]["digest"]:
        raise FolderError(
            message("the fingerprint's digest is not that of its tensors", where=where, expected=recorded.digest)
        )
    lines = differences(recorded, found)
    if lines:
        total = len({*recorded.tensors, *found.tensors})
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


def refuse_gone(document: Mapping[str, Any], where: str) -> None:
    """A backbone that was a folder is never looked up on the hub under that folder's name.

    Whatever came from there has a revision.

    Raises:
        RequestError: it was a folder, which is not here.
    """
    backbone, name = document["backbone"], document["backbone"]["name"]
    if not backbone["revision"] and not backbone.get("inside") and not Path(name).expanduser().is_dir():
        raise RequestError(
            message(
                "there is no such model folder",
                where=where,
                expected=f"the backbone's folder {name}, which is no name of the hub",
                remedy="Give the backbone: its folder, its hub id, or a live model.",
            )
        )


def fetch(folder_or_id: str | Path) -> Path:
    """The local folder of an adapter: the folder itself, or the download of a hub id.

    Raises:
        FolderError: neither a folder nor an id that opens.
        RequestError: no name at all.
    """
    if not isinstance(folder_or_id, str | Path):
        raise RequestError(
            message("no adapter", where="load", expected="a folder or hub id", found=type(folder_or_id).__name__)
        )
    path = Path(folder_or_id).expanduser()
    if path.is_dir():
        return path
    name = str(folder_or_id)
    if isinstance(folder_or_id, Path) or "/" not in name or places.is_path(name):
        raise FolderError(message("there is no such adapter folder", where=name, remedy=OURS))
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        with bars.downloading(name):
            return Path(snapshot_download(name, tqdm_class=cast("Any", bars.Bar)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as fault:
        raise FolderError(
            message(
                "neither an adapter folder nor a hub id that opens",
                where=name,
                found=" ".join(str(fault).split())[:200],
            )
        ) from fault


def refuse_foreign(target: Path) -> None:
    """Refuse an output folder that holds something that is not an adapter or a run of ours to replace.

    Raises:
        FolderError: with what was found.
    """
    places.refuse_taken(
        target, lambda content: MANIFEST in content or is_run(target), "a new folder, or one with an adapter of ours"
    )


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours that has not finished yet."""
    recipe = folder / RECIPE
    return recipe.is_file() and recipe.read_text(errors="replace").startswith(RUN_MARK)
