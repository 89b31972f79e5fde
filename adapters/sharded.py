"""A model divided over the processes of a run by accelerate's FSDP2: engaged, made ready, gathered, filled.

Each block is a unit that is gathered when it runs and let go again; the embeddings and what lies around the blocks are
units of their own. Which parameters of a unit train is each one's own matter, so frozen and trained ones share it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters import processes, ranks
from adapters.anatomy import block_lists, class_name, own_name, put
from adapters.contracts import Adapted
from adapters.errors import ContractError, RequestError, message
from adapters.quantize import packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

WITHOUT = (
    "the model is divided over the processes: a head starts as it is drawn, the frozen part is computed in every "
    "epoch, all logits of a batch are held at once, and products are taken in the weights' own dtype"
)
USE = "ACCELERATE_USE_FSDP"  # accelerate sets it itself where a run asks for FSDP, and leaves it set


# ---------------------------------------------------------------------- before the run


def block_classes(model: PreTrainedModel) -> list[str]:
    """The class names of a model's blocks, which accelerate takes for the units; empty where there are none."""
    first = [model.get_submodule(blocks.names()[0]) for blocks in block_lists(model) if blocks.length]
    return sorted({type(block).__name__ for block in first})


def config(model: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' `fsdp_config` of a run: the caller's on top of ours.

    Args:
        model: the backbone.
        given: what the caller said, checked already (`processes.sharding`).

    Raises:
        RequestError: other units than the model's blocks.
    """
    blocks = block_classes(model)
    asked = given.get("transformer_layer_cls_to_wrap") or blocks
    asked = [asked] if isinstance(asked, str) else list(asked)
    if sorted(asked) != blocks:
        raise RequestError(
            message(
                "FSDP's units are the blocks of the model",
                where="args: fsdp_config transformer_layer_cls_to_wrap",
                expected=", ".join(blocks) or "nothing: no blocks were found",
                found=", ".join(map(str, asked)),
                remedy="Leave it out: the blocks are found.",
            )
        )
    units = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": blocks}
    ours = {"version": 2, "cpu_ram_efficient_loading": False, "state_dict_type": "SHARDED_STATE_DICT"}
    kept = {"reshard_after_forward": given.get("reshard_after_forward", True)}
    return ours | (units if blocks else {"auto_wrap_policy": "NO_WRAP"}) | kept


def engage(accelerator: Any, args: TrainingArguments) -> bool:
    """Whether this run's model is divided; where it is asked for, accelerate's engine is on from here.

    accelerate turns FSDP on for GPUs alone and leaves it out without a word on the CPU, though its preparation and
    torch's `fully_shard` work there; so on the CPU it is turned on here, by what it does for GPUs.

    Args:
        accelerator: of the run.
        args: of the run.

    Raises:
        RequestError: the model would not be divided though that was asked for.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if not args.fsdp:
        return False
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and not torch.cuda.is_available():
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    if not accelerator.is_fsdp2:
        raise RequestError(
            message(
                "accelerate does not divide the model in this run",
                where="args: fsdp",
                expected="GPUs that torch sees, or a machine without any",
                found=f"{state.distributed_type} on {state.device}",
                remedy="Leave out --cpu and use_cpu on a machine with GPUs.",
            )
        )
    state.fsdp_plugin.mixed_precision_policy = _policy(state.mixed_precision)
    return True


def _policy(precision: str) -> Any:
    """What is cast when a unit is gathered: nothing, or in mixed precision everything; gradients are summed in float32.

    In mixed precision the units are cast rather than each product: a cast weight would be kept for backward, and the
    whole model with it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if precision == "no":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def refuse(adapted: Adapted, precision: str) -> None:
    """Refuse what would not be divided, or would come out in another dtype than in one process.

    Raises:
        RequestError: every fault at once.
    """
    faults = []
    trained = {name: p for name, p in adapted.model.named_parameters() if name in set(adapted.trained)}
    half = sorted(name for name, p in trained.items() if p.dtype != torch.float32)
    if precision != "no" and half:
        faults.append(
            message(
                "accelerate would turn trained tensors into float32 and save them so",
                where="args: bf16, fsdp",
                found=f"{len(half)} of {len(trained)} in {_named(trained[half[0]].dtype)}, {own_name(half[0])} first",
                remedy="Leave bf16 out: the model computes in that dtype anyway.",
            )
        )
    for unit, names in _units(adapted.model, list(trained)).items():
        kinds = sorted({_named(trained[name].dtype) for name in names})
        if len(kinds) > 1:
            faults.append(
                message(
                    "FSDP reduces the gradients of one unit in one dtype",
                    where=unit,
                    expected="trained tensors of one dtype",
                    found=" and ".join(kinds),
                    remedy="Load the backbone with load={'dtype': 'float32'}, or train in one process or without fsdp.",
                )
            )
    if adapted.vocabulary is not None:
        faults.append(
            message(
                "added tokens train some rows of a tensor, which FSDP divides by its rows",
                where="added_tokens, args: fsdp",
                remedy="Train without fsdp: accelerate launch without --use_fsdp.",
            )
        )
    if any(blocks.shared for blocks in block_lists(adapted.model)):
        faults.append(
            message(
                "the blocks share one set of weights: there is nothing to divide block by block",
                where=f"{type(adapted.model).__name__}, args: fsdp",
                remedy="Train without fsdp.",
            )
        )
    if faults:
        raise RequestError(*faults)


def _units(model: PreTrainedModel, names: Sequence[str]) -> dict[str, list[str]]:
    """The names by the unit that they lie in: a block each, and the rest."""
    blocks = [path for found in block_lists(model) for path in found.names()]
    units: dict[str, list[str]] = {}
    for name in names:
        unit = next((path for path in blocks if name.startswith(f"{path}.")), "around the blocks")
        units.setdefault(unit, []).append(name)
    return units


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def ready(adapted: Adapted, device: torch.device) -> Iterator[None]:
    """Within it accelerate divides the live model; before, its parameters are made ones that can be divided.

    bitsandbytes' parameters are a class of their own, which accelerate leaves out of the division: every process would
    hold all of them. As plain bytes they are divided like any others, and no cast of mixed precision touches them;
    their layer keeps how they are packed, and puts the class around them again when it runs.

    What is frozen is divided without its values, and afterwards each process takes its own rows of them: of weights
    that are pages of the checkpoint it reads no others, and no others are sent to its device.

    Args:
        adapted: whose model is divided.
        device: of this process.
    """
    if is_divided(adapted):  # by an earlier run
        yield
        return
    for module in packed_modules(adapted.model).values():
        held: Any = module.get_parameter("weight")
        held.quant_state.to(device)  # the scales stay whole, a 32nd of the weights' bytes
        vars(module)["quant_state"] = held.quant_state
        plain = nn.Parameter(held.detach().as_subclass(Tensor), requires_grad=False)
        _note(plain, held.quant_state)
        module._parameters["weight"] = plain
    model = adapted.model
    frozen = _emptied(model)
    for parameter in model.parameters():
        if not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    hidden = ("get_input_embeddings", "get_output_embeddings") if _embedded_twice(model) else ()
    for name in hidden:  # accelerate would divide one of several modules that share their tensor
        vars(model)[name] = lambda: None
    try:
        yield
    except BaseException:
        for names, whole in frozen:
            if not ranks.divided(model.get_parameter(names[0])):
                put(model, names, whole)
        raise
    finally:
        for name in hidden:
            del vars(model)[name]
    while frozen:
        _fill(model, *frozen.pop(), device)


def _emptied(model: PreTrainedModel) -> list[tuple[list[str], nn.Parameter]]:
    """Take what is frozen out of a model, which keeps tensors without memory in its place.

    Returns:
        Of each parameter its names, several where it is tied, and the parameter.
    """
    held: dict[int, tuple[list[str], nn.Parameter]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad and parameter.ndim:
            held.setdefault(id(parameter), ([], parameter))[0].append(name)
    for names, parameter in held.values():
        empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
        put(model, names, nn.Parameter(empty, requires_grad=False))
    return list(held.values())


def _fill(model: PreTrainedModel, names: Sequence[str], whole: nn.Parameter, device: torch.device) -> None:
    """Give a divided tensor this process' rows, in memory of their own.

    Args:
        model: after the division.
        names: of the tensor.
        whole: what it was before.
        device: where this process keeps its part.
    """
    from torch.distributed.tensor import DTensor

    parameter: Any = model.get_parameter(names[0])
    mesh = parameter.device_mesh
    parts = whole.detach().chunk(mesh.size(), dim=0)  # as torch divides it: the last ones may be empty
    number = mesh.get_local_rank()
    part = parts[number] if number < len(parts) else whole.detach()[:0]
    held = torch.empty(part.shape, dtype=part.dtype, device=device).copy_(part)
    made: Any = DTensor.from_local(
        held, mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    put(model, names, nn.Parameter(made, requires_grad=False))


def _embedded_twice(model: PreTrainedModel) -> bool:
    """Whether several modules look tokens up in one tensor, as in an encoder-decoder."""
    table = model.get_input_embeddings()
    held = getattr(table, "weight", None)
    others = (table, model.get_output_embeddings())  # type: ignore[no-untyped-call]
    return held is not None and any(
        module._parameters.get("weight") is held for module in model.modules() if module not in others
    )


def settle(adapted: Adapted) -> dict[str, nn.Parameter]:
    """After the division: the parameters that train now, by their names, each a part of what it was.

    Raises:
        RequestError: a parameter that was not divided.
    """
    from torch.distributed.fsdp import register_fsdp_forward_method

    whole = [name for name, parameter in adapted.model.named_parameters() if not ranks.divided(parameter)]
    if whole:
        raise RequestError(
            message(
                "a part of the model was not divided",
                where="args: fsdp",
                found=f"{len(whole)} parameters, {own_name(whole[0])} first",
                remedy="Leave fsdp out.",
            )
        )
    for module in adapted.model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None and "weight" in module._parameters:
            _note(module._parameters["weight"], state)
    if adapted.model.can_generate():
        register_fsdp_forward_method(adapted.model, "generate")
    if _let_go not in adapted.model._forward_hooks.values():
        adapted.model.register_forward_hook(_let_go)
    return {name: p for name, p in adapted.model.named_parameters() if name in set(adapted.trained)}


def _let_go(model: nn.Module, _args: Any, _output: Any) -> None:
    """After a pass that no backward pass follows, let go of what stays gathered for one.

    While a unit is gathered its parameters are copies: what is written to them is lost with them.
    """
    from torch.distributed.fsdp import FSDPModule

    if not torch.is_grad_enabled():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _note(parameter: Any, state: Any) -> None:
    """How packed bytes are packed, for whoever counts or unpacks them."""
    parameter.quant_state = state


# ---------------------------------------------------------------------- what is held


def is_divided(adapted: Adapted) -> bool:
    """Whether each process holds a part of the model."""
    return any(ranks.divided(parameter) for parameter in adapted.model.parameters())


def refuse_divided(adapted: Adapted, what: str) -> None:
    """Refuse what needs the whole model in one process.

    Args:
        adapted: that may be divided.
        what: was to be done.

    Raises:
        RequestError: it is divided.
    """
    if is_divided(adapted):
        raise RequestError(
            message(
                f"the model is divided over {processes.count()} processes: none of them can {what}",
                where=class_name(adapted.model),
                remedy="Save the adapter, and go on with its folder in a process of its own.",
            )
        )


def refuse_parts(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse to write what is no adapter.

    Raises:
        ContractError: this process holds parts of the tensors.
    """
    parts = [name for name, tensor in tensors.items() if ranks.divided(tensor)]
    if parts:
        raise ContractError(
            message(
                "a process holds parts of the trained tensors, which are no adapter",
                where=where,
                expected=f"{len(tensors)} whole tensors",
                found=f"{len(parts)} parts, {parts[0]} first",
                remedy="Let all processes call adapters.save.",
            )
        )


@contextlib.contextmanager
def gathered(adapted: Adapted) -> Iterator[None]:
    """Within it the first process has the trained tensors whole, on the CPU, wherever it asks for them.

    One tensor at a time is gathered, by all processes; nothing that is frozen is. All processes enter, and only the
    first one reads.
    """
    if not is_divided(adapted):
        yield
        return
    record, whole = adapted.record, together(adapted.state())
    record.gathered = whole if ranks.first() else None
    try:
        yield
    finally:
        record.gathered = None


def moments(optimizer: Any) -> dict[str, Any] | None:
    """An optimizer's state with every tensor whole, on the CPU: the form that it has in one process.

    Called by all processes; the first one gets it.
    """
    state = optimizer.state_dict()
    found: dict[Any, dict[str, Any]] = {}
    for index, kept in state["state"].items():
        entry = {}
        for name, value in kept.items():
            if isinstance(value, Tensor):
                value = ranks.whole(value)
                value = value.cpu() if ranks.first() else None
            entry[name] = value
        found[index] = entry
    return {**state, "state": found} if ranks.first() else None


def together(tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Tensors put together on the CPU, one at a time, by all processes; the first one gets them."""
    whole = {}
    for name, tensor in (tensors or {}).items():
        found = ranks.whole(tensor)
        if ranks.first():
            whole[name] = found.cpu()
        del found
    return whole if tensors is not None else None


def load_moments(optimizer: Any, state: Mapping[str, Any]) -> None:
    """Give an optimizer of divided parameters the state that was saved whole, each process its part.

    Args:
        optimizer: as it was prepared.
        state: as `moments` gave it, or as one process saved it.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = [index for group in state["param_groups"] for index in group["params"]]
    placed = {}
    for index, parameter in zip(numbers, parameters, strict=True):
        kept = state["state"].get(index)
        if kept is not None:
            placed[index] = {
                name: ranks.laid(value, parameter)
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
                else value
                for name, value in kept.items()
            }
    optimizer.load_state_dict({**state, "state": placed})
