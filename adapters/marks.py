"""What has been merged into a model, as its config says: the same adapter is not applied twice.

The field stands in the config of a merged folder, and in that of a live model that was merged into; transformers writes
it with the model and reads it again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from adapters.errors import BackboneError, message

MARK = "merged_adapters"  # config field: the digests of the merged adapters' manifests, in their order


def of(config: Mapping[str, Any]) -> list[str]:
    """The digests of the adapters that a checkpoint's config says to be in it already."""
    found = config.get(MARK)
    return [str(digest) for digest in found] if isinstance(found, list) else []


def added(config: Mapping[str, Any], digests: Iterable[str]) -> list[str]:
    """The field of a config after these adapters were merged in as well."""
    return list(dict.fromkeys([*of(config), *digests]))


def content(tensors: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of an adapter's tensors, from what its manifest says of each: shape, dtype, sha256."""
    return hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()


def refuse_marked(
    document: Mapping[str, Any] | None, digests: Collection[str], config: Mapping[str, Any], where: str
) -> None:
    """Refuse a backbone that an adapter was merged into already.

    Args:
        document: the adapter's manifest, for what its backbone is called; None where the adapter has none.
        digests: of the adapters that are to be applied.
        config: the backbone's.
        where: the backbone, for the message.

    Raises:
        BackboneError: the config names one of them.
    """
    twice = sorted(set(digests) & set(of(config)))
    if twice:
        backbone = document["backbone"] if document is not None else {}
        name = backbone.get("name") or backbone.get("model_class")
        raise BackboneError(
            message(
                "this adapter has been merged into this backbone already",
                where=where,
                expected=f"the backbone that it was trained on{f', {name}' if name else ''}",
                found=f"its digest {twice[0][:12]} in {MARK!r} of the config",
                remedy="Use the merged model as it is, or give the backbone that the adapter was trained on.",
            )
        )
