"""The folder of a plain peft adapter, read as data: its config and its tensors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import deferred, places, shards
from adapters.errors import FolderError, message, nearest
from adapters.manifest import MAX_SETTINGS, WEIGHTS, finite_tensor, refuse_code

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "adapter_config.json"
SWAPPED = "0.19.1"  # from this peft on, A reads what experts read; before, of most families, what they write


def read(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """peft's config object and the tensors by peft's keys; nothing says which backbone they belong to.

    Raises:
        FolderError: links, pickles, options that this peft does not know, values that are not finite or no floats.
    """
    places.refuse_strays(folder, deep=True)
    config = _config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise FolderError(
            message(
                "no tensors in the peft folder",
                where=str(folder),
                expected=WEIGHTS,
                found=", ".join(sorted(entry.name for entry in folder.iterdir())[:5]),
                remedy="Pickles are not opened: load it with peft where you trust it, and save it again.",
            )
        )
    refuse_code(folder, {WEIGHTS})
    slots, _ = shards.read_header(folder / WEIGHTS)
    odd = [f"{name}: {slot.dtype}" for name, slot in slots.items() if "float" not in slot.dtype]
    if odd:
        raise FolderError(
            message(
                "tensors that are no floating-point numbers",
                where=str(folder / WEIGHTS),
                found=", ".join(odd[:3]),
                remedy="peft's adapters are float32, bfloat16 or float16.",
            )
        )
    return config, {name: finite_tensor(slot, name) for name, slot in slots.items()}


def digest(folder: Path) -> str:
    """What tells this adapter from others: config and tensors, as the files have them."""
    options = shards.read_json(folder / CONFIG, MAX_SETTINGS)
    return shards.digest_of({"config": options, "weights": shards.sha256(folder / WEIGHTS)})


def _config(file: Path) -> Any:
    """peft's config from its file, of which peft itself would drop what it does not know.

    Raises:
        FolderError: no JSON object, a method or an option that peft does not have, a value that peft refuses.
    """
    deferred.import_peft()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    options = shards.read_json(file, MAX_SETTINGS)
    if not isinstance(options, dict) or not options:
        raise FolderError(message("not a peft config", where=str(file), expected="a JSON object", found=repr(options)))
    kinds = {str(getattr(kind, "value", kind)): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = options.pop("peft_type", None)
    if kind not in kinds:
        raise FolderError(message(f"unknown peft_type {kind!r}", where=str(file), remedy=nearest(str(kind), kinds)))
    known = kinds[kind].__dataclass_fields__
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise FolderError(
            message(
                "options that this peft does not know",
                where=str(file),
                found=", ".join(unknown[:5]),
                remedy="Install the peft that wrote it, or take them out if they change nothing.",
            )
        )
    if options.get("target_parameters"):
        _refuse_turned(options.get("peft_version"), file)
    try:
        return kinds[kind](**options)
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise FolderError(
            message("peft refuses the config", where=str(file), found=" ".join(str(fault).split())[:200])
        ) from fault


def _refuse_turned(version: object, file: Path) -> None:
    """Refuse factors of experts from a time when peft laid them out the other way round.

    Where an expert's matrix is square no shape would tell.

    Raises:
        FolderError: an older peft wrote them, or none that says which it is.
    """
    from packaging.version import InvalidVersion, Version

    try:
        new = Version(str(version).partition("@")[0]) >= Version(SWAPPED)
    except InvalidVersion:
        new = False
    if not new:
        raise FolderError(
            message(
                "factors of experts that an older peft laid out the other way round",
                where=f"{file}: target_parameters",
                expected=f"peft_version {SWAPPED} or newer",
                found=repr(version),
                remedy="Merge it with the peft that wrote it, and take a new adapter out of the merged model: "
                "adapters.extract(merged, output, base=..., rank=...).",
            )
        )
