"""Trained tensors that a checkpoint holds in other pieces than memory does: Mixtral's fused experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.edits import Edit, replace_all
from adapters.errors import RequestError, message


def on_disk(edits: Mapping[str, Edit], document: Mapping[str, Any], source: Path) -> dict[str, Edit]:
    """The edits by names that the checkpoint knows; whole trained tensors are divided as transformers saves them.

    Only where a tensor has no counterpart of its own on disk is the model class asked, on the meta device.

    Args:
        edits: by the names in memory.
        document: the adapter's manifest.
        source: the backbone's folder.

    Raises:
        RequestError: an edit that needs the old value of a tensor that is not on disk as it is in memory.
    """
    backbone = document["backbone"]
    prefix = backbone["fingerprint"]["prefix"]
    known = set(backbone["fingerprint"]["tensors"]) | set(document["head"])
    apart = {
        name: edit
        for name, edit in edits.items()
        if name not in backbone["names"] and name not in known and name.removeprefix(f"{prefix}.") not in known
    }
    if not apart:
        return dict(edits)
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

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
    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    kind = getattr(transformers, backbone["model_class"], None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise RequestError(
            message("transformers has no such model class", where="backbone", found=backbone["model_class"])
        )
    with torch.device("meta"):
        model = kind(config)
    divided = revert_weight_conversion(model, tensors)
    kept = {name: edit for name, edit in edits.items() if name not in apart}
    return kept | replace_all({name: tensor.contiguous() for name, tensor in divided.items()})
