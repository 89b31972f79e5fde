"""A strategy tried on a copy of the model that holds no weights, before anything of the live model changes.

`adapt` does it so that every check speaks first; `plan` does it because a copy without memory can be counted.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch

from adapters.anatomy import LinearMap, own_name, passed_over, skeleton
from adapters.contracts import Strategy
from adapters.errors import RequestError, message
from adapters.pooling import refuse_unread
from adapters.quantize import Storage, packable, refuse_nothing
from adapters.reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@final
@dataclass(frozen=True)
class Trial:
    """What a strategy would do to a model.

    Attributes:
        strategy: resolved: every "auto" made concrete.
        ghost: the copy on the meta device, with the strategy applied.
        names: the backbone's own names of what trains, as far as it is read; without the head.
        maps: the linear maps inside the blocks that stay frozen, which may be packed.
    """

    strategy: Strategy
    ghost: PreTrainedModel
    names: set[str]
    maps: list[LinearMap]


def tried(
    model: PreTrainedModel,
    strategy: Strategy,
    head: frozenset[str],
    unread: Collection[str],
    reading: Reading,
    storage: Storage,
) -> Trial:
    """Resolve a strategy and apply it to a copy; the model stays as it is, and may be on the meta device itself.

    Args:
        model: the backbone with its head.
        strategy: as it was asked for.
        head: own names of the head's parameters and of whatever loading made new.
        unread: own names of the parameters that the head's reading leaves out of the computation.
        reading: where the head reads.
        storage: how the frozen rest is to be kept.

    Raises:
        RequestError: whatever the strategy refuses; what would train without being read, or in float16; a packing of
            nothing.
    """
    ghost = skeleton(model)
    if storage.quantization is not None:
        vars(ghost)["is_loaded_in_4bit"] = True  # as packing will leave it on the live model
    strategy = strategy.resolve(ghost, head)
    names = {own_name(name) for name in strategy.apply(ghost)}
    refuse_unread(names, unread, passed_over(model), reading)
    names -= set(unread)
    if any(p.dtype == torch.float16 and name in names | head for name, p in model.named_parameters()):
        raise RequestError(
            message(
                "fp16 weights cannot train: their gradients overflow and the optimizer's steps vanish",
                where=type(model).__name__,
                remedy="Load the backbone with load={'dtype': 'bfloat16'} or 'float32'.",
            )
        )
    maps = [found for found in packable(model) if f"{found.path}.weight" not in names | head]
    refuse_nothing(maps, storage)
    return Trial(strategy, ghost, names, maps)
