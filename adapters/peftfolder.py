"""A peft folder that every reader of peft folders reads alike: plain LoRA, one rank, lora_alpha equal to it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import facts, shards
from adapters.injection import PREFIX
from adapters.manifest import CARD, MANIFEST, RECIPE, WEIGHTS
from adapters.strategies.lora import Lora

if TYPE_CHECKING:
    from adapters.changes import Changes
    from adapters.lowrank import Factors
    from adapters.updates import Updates

OURS = {MANIFEST, RECIPE, CARD}  # what only this library reads, and the card of another folder


def handed_over(stage: Path, changes: Changes) -> None:
    """The adapter's own files, bit for bit, without the manifest: where peft reads the strategy itself."""
    for name in changes.document["files"]:
        if name not in OURS:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shards.copy(changes.folder / name, stage / name)


def write(stage: Path, changes: Changes, found: Updates, factors: Mapping[str, Factors], net: Any, dtype: str) -> None:
    """Config, factors, whole tensors beside them, and the adapter's processor.

    Args:
        stage: an empty folder.
        changes: the adapter.
        found: what it does.
        factors: by module path, all of one rank, at scale 1.
        net: the model on the meta device, without adapters.
        dtype: of the tensors written.
    """
    import torch

    rank = next(iter(factors.values())).rank
    beside = sorted(set(found.whole) - found.head)
    strategy = Lora(
        r=rank,
        lora_alpha=rank,
        target_modules=tuple(factors),
        unfrozen_parameters=tuple(f"^{re.escape(name)}$" for name in beside),
    ).resolve(net, found.head)
    state = strategy.tensors(factors)
    for name, tensor in found.whole.items():
        path, _, last = name.rpartition(".")
        state[f"{PREFIX}{path}.base_layer.{last}" if path in factors else PREFIX + name] = tensor
    kind = getattr(torch, dtype)
    state = {name: tensor.detach().to(kind).contiguous() for name, tensor in sorted(state.items())}
    shards.save_tensors(stage / WEIGHTS, state, {"format": "pt"})
    backbone = changes.document["backbone"]
    config = facts.sidecars(strategy, None, backbone["name"], backbone["revision"])[facts.SIDECAR]
    shards.write_text(stage / facts.SIDECAR, json.dumps(config, indent=2, sort_keys=True) + "\n")
    facts.hand_on(changes.folder, changes.document, stage)
