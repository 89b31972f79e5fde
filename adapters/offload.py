"""A model that transformers and accelerate have put on a device, in the processor's memory and on the disk.

They decide what goes where (`device_map`, `max_memory`), and load it so. But between passes accelerate leaves nothing
where an offloaded weight stands. Here it is given back its values: those in the processor's memory, or pages of the
checkpoint's own files, which take no memory that the system could not take back. Copies on the device stand in its
place for the length of a pass (`onload`).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters import processes
from adapters.anatomy import block_lists, is_tuner_layer, own_name, owner, put
from adapters.errors import RequestError, message
from adapters.onload import MARK, Onload, Placed, attach, attached, placed
from adapters.pages import Files
from adapters.quantize import packed_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Held = dict[str, Tensor]


def taken_over(net: PreTrainedModel) -> bool:
    """Take a model over from accelerate's hooks, if it has any that offload.

    What the checkpoint lacks has lost its first values, if it was to be offloaded; it stands in the processor's memory.

    Returns:
        Whether there were any.

    Raises:
        RequestError: packed weights; several devices beside the processor; several processes of which each would keep
            a copy; weights in the processor's way of keeping them that transformers does not write.
    """
    from accelerate.hooks import remove_hook_from_submodules

    hooks = {path: list(_hooks(module)) for path, module in net.named_modules() if "_hf_hook" in vars(module)}
    if not any(hook.offload for found in hooks.values() for hook in found):
        return False
    device = _computing(net, {_device(hook) for found in hooks.values() for hook in found} - {None})
    lost = [hook for found in hooks.values() for hook in found if hook.offload]
    values = _values(net, hooks)
    for hook in lost:
        hook.offload = False  # else accelerate asks for a value of what the checkpoint lacks
    remove_hook_from_submodules(net)
    for module in net.modules():  # accelerate leaves the class's own forward pass behind, as one of the instance
        if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
            vars(module).pop("forward")
    away = _put(net, values)
    vars(net)[MARK] = Placed(device, frozenset(away))
    if device.type == "cpu":
        vars(net).pop("hf_device_map", None)  # all of it lies where the processor computes
    else:
        _attach(net, device)
    logger.info("%d weights lie elsewhere than on %s, and are copied there for each pass", len(away), device)
    return True


def _hooks(module: nn.Module) -> Iterator[Any]:
    """accelerate's hooks of a module that move tensors."""
    from accelerate.hooks import AlignDevicesHook, SequentialHook

    hook: Any = vars(module)["_hf_hook"]
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook):
            yield one


def _device(hook: Any) -> torch.device | None:
    asked = hook.execution_device
    return None if asked is None else torch.empty(0, device=torch.device(asked)).device  # "cuda" is "cuda:0"


def _computing(net: PreTrainedModel, devices: Collection[torch.device | None]) -> torch.device:
    """The one device that computes.

    Raises:
        RequestError: there are several, or several processes, or packed weights.
    """
    found = sorted({device for device in devices if device is not None and device.type != "cpu"}, key=str)
    where = f"{net.name_or_path or type(net).__name__}, device_map"
    if packed_modules(net):
        raise RequestError(
            message(
                "weights in 4 bits are not offloaded",
                where=where,
                remedy="Leave device_map out, or name one device: packed, a weight takes a quarter of 16 bits.",
            )
        )
    if len(found) > 1:
        raise RequestError(
            message(
                "a model is offloaded beside one device that computes",
                where=where,
                expected="one device, cpu and disk",
                found=", ".join(map(str, found)),
                remedy="Name one device, or divide the model over several processes (fsdp).",
            )
        )
    if found and processes.count() > 1:
        raise RequestError(
            message(
                "a model whose weights come and go belongs to one process",
                where=where,
                expected="1 process",
                found=f"{processes.count()} processes",
                remedy="Leave device_map out and divide the model (fsdp), or start one process.",
            )
        )
    return found[0] if found else torch.device("cpu")


def _values(net: PreTrainedModel, hooks: Mapping[str, Collection[Any]]) -> dict[str, Tensor]:
    """What the hooks would bring, by its name in the model; without what the checkpoint lacks."""
    from accelerate.utils.modeling import named_module_tensors

    values: dict[str, Tensor] = {}
    with Files() as files:
        for path, found in hooks.items():
            module = net.get_submodule(path)
            for hook in (hook for hook in found if hook.offload):
                own = named_module_tensors(
                    module, hook.offload_buffers, recurse=hook.place_submodules, remove_non_persistent=True
                )
                for name, held in list(own):
                    value = _value(hook.weights_map, name, held.dtype, files)
                    if value is not None:
                        values[f"{path}.{name}" if path else name] = value
    return values


def _value(weights: Any, name: str, dtype: torch.dtype, files: Files) -> Tensor | None:
    """One weight of accelerate's map: a tensor in memory, or the pages of a file; None where the map has it not."""
    from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset

    while isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    if not isinstance(weights, OffloadedWeightsLoader):
        weights = dict(weights)
    known: Mapping[str, Tensor] = weights if isinstance(weights, dict) else weights.state_dict
    if isinstance(weights, dict) or name in known:
        return known.get(name)
    place: Any = weights.index.get(name)
    if place is None:
        return None
    if "safetensors_file" not in place:
        raise RequestError(
            message(
                "an offloaded weight is in no safetensors file",
                where=f"{weights.save_folder}: {name}",
                remedy="Let from_pretrained offload it: device_map, offload_folder.",
            )
        )
    folder = Path(weights.save_folder) if weights.save_folder else None
    return files.paged(place.get("weight_name", name), Path(place["safetensors_file"]), dtype, folder)


def _put(net: PreTrainedModel, values: Mapping[str, Tensor]) -> list[str]:
    """Values in the place of tensors without memory; the names of the parameters that got one.

    Tied weights are one parameter again.
    """
    tensors: list[tuple[str, Tensor]] = [*net.named_parameters(remove_duplicate=False)]
    tensors += net.named_buffers(remove_duplicate=False)
    held: dict[int, list[tuple[str, Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.is_meta:
            held.setdefault(id(tensor), []).append((name, tensor))
    away: list[str] = []
    for entries in held.values():
        names, old = [name for name, _ in entries], entries[0][1]
        value = next((values[name] for name in names if name in values), None)
        fresh: Tensor = torch.empty_like(old, device="cpu") if value is None else value
        if isinstance(old, nn.Parameter):
            fresh = nn.Parameter(fresh, old.requires_grad)
            away += names if value is not None else []
        put(net, names, fresh)
    return away


def _attach(net: PreTrainedModel, device: torch.device) -> None:
    """Hooks on the blocks and on what owns a weight around them; inputs are moved on the way to these, too."""
    skip = net._skip_keys_device_placement
    blocks = [path for found in block_lists(net) for path in found.names()]
    units: dict[str, Any] = {}
    for name, tensor in [*net.named_parameters(remove_duplicate=False), *net.named_buffers()]:
        if tensor.device != device:
            block = next((path for path in blocks if name.startswith(f"{path}.")), None)
            units[owner(name) if block is None else block] = "own" if block is None else "all"
    around = {path.rsplit(".", count)[0] for path in units for count in range(1, path.count(".") + 1)} | {""}
    for path in sorted(around | set(units)):
        hook = Onload(device, units.get(path), back=path == "", skip=skip)
        attach(net.get_submodule(path), hook)


# ---------------------------------------------------------------------- what a strategy does to it


def refuse_trained(net: PreTrainedModel, names: Collection[str], *, grows: bool) -> None:
    """Refuse to train what is offloaded; a head and what is new may be, for they are put on the device.

    Args:
        net: the backbone.
        names: that a strategy trains, by the backbone's own names, the head and what is new left out.
        grows: rows of the embeddings train, too.

    Raises:
        RequestError: naming them.
    """
    found = placed(net)
    if found is None:
        return
    wanted = set(names)
    if grows:
        layers: tuple[Any, ...] = (net.get_input_embeddings(), net.get_output_embeddings())  # type: ignore[no-untyped-call]
        ids = {id(parameter) for layer in layers if layer is not None for parameter in layer.parameters()}
        wanted |= {name for name, parameter in net.named_parameters() if id(parameter) in ids}
    lost = sorted(wanted & found.names)
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise RequestError(
            message(
                "weights that are to be trained are offloaded",
                where=f"{net.name_or_path or type(net).__name__}, device_map",
                expected="what trains is on the device that computes, with its gradients and the optimizer's state",
                found=f"{len(lost)} tensors elsewhere: {shown}",
                remedy="Name their modules in device_map with that device, train fewer layers, or take 'lora': its "
                "factors lie on the device, whatever is offloaded.",
            )
        )


def refuse_folded(net: PreTrainedModel, names: Collection[str]) -> None:
    """Refuse factors beside experts that come to the device and go: peft's sum of both has no place for copies.

    Args:
        net: the backbone.
        names: of the stacks that get factors.

    Raises:
        RequestError: naming those that lie elsewhere.
    """
    found = placed(net)
    lost = sorted(set(names) & found.names) if found is not None and found.device.type != "cpu" else []
    if lost:
        shown = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise RequestError(
            message(
                "experts that are to get factors are offloaded",
                where=f"{net.name_or_path or type(net).__name__}, device_map",
                expected="stacks on the device that computes, where their sum with the factors is made in every pass",
                found=f"{len(lost)} stacks elsewhere: {shown}",
                remedy="Name their blocks in device_map with that device, or choose others: layers_to_transform.",
            )
        )


def settle(net: PreTrainedModel, trained: Collection[str]) -> None:
    """Put what trains on the device that computes, once a strategy has been applied.

    Args:
        net: the backbone.
        trained: names in memory.
    """
    found = placed(net)
    if found is None or found.device.type == "cpu":
        return
    wanted, moved = set(trained), dict[int, Tensor]()
    for name, parameter in list(net.named_parameters(remove_duplicate=False)):
        if parameter.device == found.device or not (name in wanted or id(parameter) in moved):
            continue
        if id(parameter) not in moved:
            moved[id(parameter)] = nn.Parameter(parameter.detach().to(found.device), parameter.requires_grad)
        put(net, [name], moved[id(parameter)])
    for module in net.modules():
        if is_tuner_layer(module):  # some read the weight inside of them without calling the module that holds it
            tuner: Any = module
            beneath = attached(tuner.get_base_layer())
            if beneath is not None and attached(module) is None:
                attach(module, Onload(found.device, "all", skip=beneath.skip))
    gone = {own_name(name) for name in wanted}
    vars(net)[MARK] = Placed(found.device, frozenset(found.names - gone))
