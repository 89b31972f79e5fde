"""What has been merged into a checkpoint, as its config says: the same adapter is not applied twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from adapters.errors import BackboneError, message

MARK = "merged_adapters"  # config field: the digests of the merged adapters' manifests, in their order


def of(config: Mapping[str, Any]) -> list[str]:
    """The digests of the adapters that a checkpoint's config says to be in it already."""
    found = config.get(MARK)
    return [str(digest) for digest in found] if isinstance(found, list) else []


def refuse_marked(document: Mapping[str, Any], digests: Collection[str], config: Mapping[str, Any], where: str) -> None:
    """Refuse a backbone that an adapter was merged into already.

    Args:
        document: the adapter's manifest, for what its backbone is called.
        digests: of the adapters that are to be applied.
        config: the backbone's.
        where: the backbone, for the message.

    Raises:
        BackboneError: the config names one of them.
    """
    twice = sorted(set(digests) & set(of(config)))
    if twice:
        name = document["backbone"]["name"] or document["backbone"]["model_class"]
        raise BackboneError(
            message(
                "this adapter has been merged into this backbone already",
                where=where,
                expected=f"the backbone that it was trained on, {name}",
                found=f"its digest {twice[0][:12]} in {MARK!r} of the config",
                remedy="Use the merged model as it is, or give the backbone that the adapter was trained on.",
            )
        )
