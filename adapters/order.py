"""The order in which a model's modules run, seen in a pass over a copy that holds no weights.

Where a module is registered does not tell when it runs: BART registers the norm of its embeddings after its blocks,
DeBERTa the table of relative positions that every block reads.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters import graph, onload
from adapters.anatomy import (
    block_lists,
    brought_by_peft,
    copied,
    is_tuner_layer,
    linear_map,
    own_name,
    own_path,
    owner,
    tuner_layers,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TOKENS = 4  # length of the row that is passed through


def above_blocks(model: PreTrainedModel) -> set[str]:
    """Backbone parameters that run after the last block, up to the output layer: final norms and poolers."""
    lists = block_lists(model)
    if not lists:
        return set()
    calls = passage(model)
    stack = f"{lists[-1].path}."
    end = max((last for path, (_, last) in calls.items() if path.startswith(stack)), default=-1)
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    inside -= {id(parameter) for parameter in output.parameters()} if output is not None else set()
    return {
        name
        for name, parameter in model.named_parameters()
        if id(parameter) in inside and own_name(owner(name)) in calls and calls[own_name(owner(name))][0] > end >= 0
    }


def quiet(model: PreTrainedModel, trained: Iterable[str], *, recomputed: bool, dropout: bool) -> list[nn.Module]:
    """The modules that run in eval mode while a run trains.

    Args:
        model: with or without adapters.
        trained: live names of all that trains.
        recomputed: activations are checkpointed.
        dropout: it is asked for in the frozen part, too; running statistics stand still all the same.
    """
    found = [*frozen_below(model, trained), *frozen_within(model, trained, recomputed=recomputed)]
    return [module for module in found if not dropout or getattr(module, "running_mean", None) is not None]


def frozen_below(model: PreTrainedModel, trained: Iterable[str]) -> list[nn.Module]:
    """The modules that run before the first trained one, and every normalisation with running statistics.

    They run in eval mode while training goes on. What runs before the first trained module is a pure function of its
    input: no dropout, no skipped layer; this includes the module that holds a stack of blocks, whose own dropout acts
    on the embeddings, as long as the stack's first block is among them. Running statistics belong to the backbone
    under every strategy: a batch's own would make the loss depend on how rows are divided into micro-batches, and
    they are no parameters, so that no adapter could bring them back.
    """
    tuners = {own_path(path) for path, module in model.named_modules() if is_tuner_layer(module)}
    wanted = set(trained)
    ids = {id(parameter) for name, parameter in model.named_parameters() if name in wanted}
    # A tied parameter trains wherever it is used.
    owners = {owner(name) for name, p in model.named_parameters(remove_duplicate=False) if id(p) in ids}
    stops = tuners | {own_path(path) for path in owners}
    calls = passage(model)
    registered = {own_path(path): index for index, (path, _) in enumerate(model.named_modules())}

    def called(path: str) -> str | None:
        """The module itself where it was called, else the nearest around it; None in the head."""
        here = path
        while here not in calls and here:
            here = owner(here)
        return here if here in calls else None

    def start(path: str) -> tuple[int, int]:
        """When a module runs first; the head runs after the backbone, in the order in which it is registered."""
        here = called(path)
        return (1, registered.get(path, 0)) if here is None else (0, calls[here][0])

    def holds_trained(path: str) -> bool:
        return path in stops or any(stop.startswith(f"{path}.") for stop in stops)

    first = min((start(path) for path in stops), default=(2, 0))
    # Of a module that was never called, only that much is known: it is below where all around it is.
    below = {path for path in registered if path and start(path) < first and not holds_trained(called(path) or path)}
    stacks = {owner(blocks.path) for blocks in block_lists(model) if blocks.names()[0] in below} - {""}
    return [
        module
        for path, module in model.named_modules()
        if own_path(path) in below | stacks or getattr(module, "running_mean", None) is not None
    ]


def frozen_within(model: PreTrainedModel, trained: Iterable[str], *, recomputed: bool) -> list[nn.Module]:
    """What is frozen of the blocks of which nothing but adapters trains: all their modules, adapters left out.

    Their dropout is dropout in the frozen part, wherever the adapters stand.

    Args:
        model: with or without adapters.
        trained: live names of all that trains.
        recomputed: activations are checkpointed; transformers asks the mode of a block whether to, so that the block
            itself is left out, with what it drops by itself (BART's).
    """
    wanted = {own_name(name) for name in trained}
    tuners = {path for path, module in model.named_modules() if is_tuner_layer(module)}
    own = {own_name(name) for name, _ in model.named_parameters() if not brought_by_peft(name, tuners)}
    found: list[nn.Module] = []
    for path in (path for blocks in block_lists(model) for path in blocks.names()):
        if any(name.startswith(f"{path}.") for name in wanted & own):
            continue
        block = model.get_submodule(path)
        adapted = [module for module in block.modules() if is_tuner_layer(module)]
        kept = {id(inner) for module in adapted for inner in module.modules()}
        bases: list[Any] = adapted
        kept -= {id(inner) for module in bases for inner in module.get_base_layer().modules()}
        if recomputed:
            kept.add(id(block))
        found += [module for module in block.modules() if id(module) not in kept]
    return found


def passage(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """When each module of the base model runs: path -> number of its first and of its last call; found once a graph."""
    return graph.known(model, "passage", lambda: _passed(model))


def _passed(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """The same, seen.

    The pass goes through a copy of the graph whose weights are one stretched zero and whose linear maps only give the
    shape of their output, so that it takes neither memory nor time. Where a model cannot run on made-up inputs, the
    order of registration stands for the order of running.
    """
    bare = copied(model, _stretched)
    onload.strip(bare)  # stretched zeros would become whole ones
    for path, tuner in tuner_layers(bare):
        bare.set_submodule(path, tuner.get_base_layer())
    calls: dict[str, tuple[int, int]] = {}
    clock = itertools.count()
    for path, module in bare.named_modules():
        described = linear_map(path, module)
        if described is not None:
            vars(module)["forward"] = _shape_only(described.shape[1])
        module.register_forward_pre_hook(_recorder(path, calls, clock))
    try:
        for choose in (bare.set_attn_implementation, bare.set_experts_implementation):
            choose("eager")  # kernels want a device or an alignment that a stretched zero has not
        with torch.no_grad():
            bare.train(False)
            bare.base_model(**_inputs(bare))
    except Exception as fault:  # model code may raise anything on inputs that it was not made for
        logger.info(
            "%s cannot be run without data (%s): its modules are taken to run in the order of their registration",
            type(model).__name__,
            " ".join(str(fault).split())[:200],
        )
        base = {id(module) for module in bare.base_model.modules()}
        return {path: (at, at) for at, (path, module) in enumerate(bare.named_modules()) if id(module) in base}
    return calls


def _stretched(tensor: Tensor) -> Tensor:
    """Zeros of this shape in the memory of one."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _shape_only(features: int) -> Callable[[Tensor], Tensor]:
    return lambda inputs: inputs.new_zeros((*inputs.shape[:-1], features))


def _recorder(path: str, calls: dict[str, tuple[int, int]], clock: Iterator[int]) -> Callable[..., None]:
    def record(_module: nn.Module, _inputs: Any) -> None:
        now = next(clock)
        calls[path] = (calls.get(path, (now, now))[0], now)

    return record


def _inputs(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """One row that the model takes: an image without content, or a few times the same token."""
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 32
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros((1, config.num_channels, height, width), dtype=model.dtype)}
    ids = torch.ones((1, TOKENS), dtype=torch.long)
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
