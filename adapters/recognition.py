"""Which backbone a live model is: its fingerprint, of its checkpoint where that is at hand, else of its memory.

And, before anything is opened, whether one can be the backbone of an adapter at all.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from adapters import fingerprint as prints
from adapters.errors import BackboneError, FolderError, message
from adapters.quantize import packed_modules, repacked_differs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.fingerprint import Fingerprint


def refuse_kind(recorded: Mapping[str, Any], config: Mapping[str, Any], where: str, place: str) -> None:
    """Refuse a backbone of another architecture, before a strategy looks for its modules in there.

    Args:
        recorded: what the adapter's manifest says of its backbone.
        config: of the backbone at hand; empty where that is not known yet.
        where: the adapter; place: the backbone at hand.

    Raises:
        BackboneError: it is another model type than the recorded class is of.
    """
    import transformers

    kind: Any = getattr(transformers, str(recorded["model_class"]), None)
    known = isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)
    wanted = cast("Any", kind).config_class.model_type if known else None
    found = config.get("model_type")
    if wanted and found and wanted != found:
        raise BackboneError(
            message(
                "this is not the backbone that the adapter was trained on",
                where=where,
                expected=f"{recorded['name'] or 'a model'}, of type {wanted}",
                found=f"{place}, of type {found}",
                remedy="Give the right backbone.",
            )
        )


def identify(
    model: PreTrainedModel,
    head: frozenset[str],
    folder: Path | None,
    *,
    trust: bool,
    full: bool = True,
    claimed: Fingerprint | None = None,
) -> Fingerprint:
    """The backbone's fingerprint: from its checkpoint where there is one, else from memory.

    Args:
        model: the live model.
        head: what is left out.
        folder: where its checkpoint may lie.
        trust: the model has just been loaded from there; a live model is compared with it first.
        full: hash every byte.
        claimed: the caller's word, taken where packed weights cannot be identified; None refuses them.

    Raises:
        BackboneError: packed weights whose full-precision checkpoint is not at hand or is another one.
    """
    packed = {f"{path}.weight".replace(".base_layer.", ".") for path in packed_modules(model)}
    on_disk = None
    if folder is not None:
        with contextlib.suppress(FolderError):  # older checkpoints hold no safetensors: identified from memory
            on_disk = prints.of_folder(model, head | packed if not trust else head, folder, full=full)
    if packed and not trust:
        try:
            return _of_packed(model, head, packed, folder, on_disk, full=full)
        except BackboneError:
            if claimed is None:
                raise
            return claimed
    if on_disk is not None and trust:
        return on_disk
    in_memory = prints.of_model(model, head, full=full)
    if on_disk is not None and not prints.differences(on_disk, in_memory):
        return on_disk  # the finer of the two, where the live model was loaded in fewer bits
    return in_memory


def _of_packed(
    model: PreTrainedModel,
    head: frozenset[str],
    packed: set[str],
    folder: Path | None,
    on_disk: Fingerprint | None,
    *,
    full: bool,
) -> Fingerprint:
    """The fingerprint of a live model in 4 bits: its checkpoint's, once packing that gives the same bytes."""
    if folder is None or on_disk is None:
        raise BackboneError(
            message(
                "a model in 4 bits can only be identified beside its full-precision checkpoint",
                where=type(model).__name__,
                expected="a name_or_path that opens",
                found=repr(model.name_or_path),
                remedy="Adapt the id or folder with quantization='nf4', or say adapters.load(..., verify='off').",
            )
        )
    slots = prints.disk_slots(model, folder)
    wrong = repacked_differs(model, lambda name: prints.read_backbone_tensor(slots, name))
    if wrong:
        raise BackboneError(
            message(
                "the packed weights are not those of the model's own checkpoint",
                where=f"{model.name_or_path}: {', '.join(wrong[:3])}",
                found=f"{len(wrong)} of {len(packed)} differ",
            )
        )
    if prints.differences(on_disk, prints.of_model(model, head, skip=packed, full=full)):
        raise BackboneError(message("the live 4-bit model differs from its checkpoint", where=str(model.name_or_path)))
    return prints.of_folder(model, head, folder, full=full)


def packed_kind(model: PreTrainedModel) -> str:
    module = next(iter(packed_modules(model).values()))
    state: Any = module.get_parameter("weight")
    return str(state.quant_state.quant_type)
