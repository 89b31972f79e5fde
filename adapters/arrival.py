"""A backbone that is to be packed, opened without its weights: each is read from the checkpoint where it is wanted.

transformers opens the model on the meta device, which tells what it would load, under which name and in which dtype,
what the checkpoint lacks, and reads nothing. What is small or stays whole is filled in at once, on the CPU as pages of
the file that all processes of a machine share; what is new is drawn as transformers draws it. The linear maps of the
blocks arrive later, one at a time, each to be packed or kept. So memory never holds more of them unpacked than one.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from adapters import shards
from adapters.anatomy import owner, put
from adapters.errors import FolderError
from adapters.pages import Files
from adapters.quantize import Keep, packable
from adapters.shards import Slot

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Place = tuple[str, Slot]  # a tensor's name in the checkpoint, and where it lies

FOLDER = "offload_folder"  # where transformers keeps weights that are to be pages of files; here the packed ones, too
# What may be said of a load that is streamed; anything else may change what transformers makes of a checkpoint.
KNOWN = {"dtype", "device_map", "revision", "token", "cache_dir", "attn_implementation", "local_files_only", FOLDER}


@final
class Later:
    """Weights of a model that still lie in its checkpoint, and stand in the model without memory.

    Args:
        model: the model.
        places: where they lie, by their names in the model.
        device: that they are for.
    """

    def __init__(self, model: PreTrainedModel, places: Mapping[str, Place], device: torch.device) -> None:
        self._model, self._places, self._device = model, dict(places), device

    def bring(self, name: str) -> None:
        """Read one of them into the model, into memory of its own; others are left alone."""
        place = self._places.pop(name, None)
        if place is None:
            return
        old = self._model.get_parameter(name)
        value = shards.read_tensor(place[1]).to(self._device, old.dtype)
        put(self._model, [name], _loaded(value, old))

    def bring_all(self) -> None:
        """Read what is left, as transformers would."""
        with Files() as files:
            for name in list(self._places):
                old = self._model.get_parameter(name)
                key, slot = self._places.pop(name)
                put(self._model, [name], _loaded(files.read(key, slot.file).to(self._device, old.dtype), old))


def _divided() -> bool:
    """Whether transformers gives each process a part of what it loads, or nothing."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_enabled

    return bool(is_fsdp_enabled() or is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]


def device_of(load: Mapping[str, Any]) -> torch.device | None:
    """The one device that everything goes to; None where there may be several, or more is asked of the load.

    Args:
        load: what `from_pretrained` takes.
    """
    if _divided():
        return None
    if load.keys() - KNOWN:
        return None
    asked = load.get("device_map")
    if isinstance(asked, Mapping):
        if asked.keys() != {""}:
            return None
        asked = asked[""]
    if asked is None:
        return torch.device("cpu")
    if asked in ("auto", "balanced", "balanced_low_0", "sequential", "disk", "meta"):
        return None
    if asked == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cuda", asked) if isinstance(asked, int) else torch.device(asked)


@contextlib.contextmanager
def keeping(load: Mapping[str, Any]) -> Iterator[Keep | None]:
    """Within it, what makes packed tensors pages of files in the folder that a load names; None where it names none."""
    folder = _folder(load)
    if folder is None:
        yield None
        return
    with Files() as files:
        yield functools.partial(files.kept, folder)


def _folder(load: Mapping[str, Any]) -> Path | None:
    said = load.get(FOLDER)
    return Path(said).expanduser() if said else None


def filled(
    net: PreTrainedModel, folder: Path | None, device: torch.device, before: Tensor, load: Mapping[str, Any]
) -> Later:
    """Fill a model in but for its blocks' linear maps; what the checkpoint lacks gets its first values.

    Args:
        net: opened on the meta device.
        folder: its checkpoint.
        device: where it is to be.
        before: torch's random state before it was opened, from which a load would have drawn.
        load: what `from_pretrained` took.

    Raises:
        FolderError: what the model holds is not what the checkpoint's tensors say one to one.
    """
    if not torch.equal(torch.get_rng_state(), before):
        raise FolderError("the model draws at random while it is made")
    places = _places(net, folder)
    held: dict[int, list[str]] = {}
    for name, tensor in [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]:
        held.setdefault(id(tensor), []).append(name)
    tied = {*net.all_tied_weights_keys.keys(), *net.all_tied_weights_keys.values()}
    state = net.state_dict(keep_vars=True)
    fitting = {name: place for name, place in places.items() if place[1].shape == tuple(state[name].shape)}
    missing = state.keys() - fitting.keys()
    weights = {f"{found.path}.weight" for found in packable(net)} - tied
    later = {name: place for name, place in fitting.items() if name in weights and len(held[id(state[name])]) == 1}
    with Files() as files:
        for names in held.values():
            old = _at(net, names[0])
            source = next((name for name in names if name in fitting), None)
            if names[0] in later:
                vars(old)["_is_hf_initialized"] = True
            elif source is not None:
                key, slot = fitting[source]
                put(net, names, _loaded(_read(files, key, slot, old, device, _folder(load)), old))
            elif any(name in tied for name in names) and len(names) > 1:
                raise FolderError(f"tied weights that the checkpoint does not hold: {names[0]}")
            else:
                empty = torch.empty_like(old, device=device)
                put(net, names, nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty)
    for module in net.modules():
        vars(module).pop("_is_hf_initialized", None)
    with torch.no_grad():
        net.initialize_weights()  # type: ignore[no-untyped-call]
    net.tie_weights(missing_keys=set(missing), recompute_mapping=False)
    return Later(net, later, device)


def _read(files: Files, key: str, slot: Slot, old: Tensor, device: torch.device, folder: Path | None) -> Tensor:
    """A tensor of the checkpoint in the dtype of another; on the processor as pages of a file, where it may be."""
    if folder is not None and device.type == "cpu":
        return files.paged(key, slot.file, old.dtype, folder)
    return files.read(key, slot.file).to(device, old.dtype)


def _places(net: PreTrainedModel, folder: Path | None) -> dict[str, Place]:
    """Where each of the model's tensors lies, by its name in the model, as transformers would load it.

    Raises:
        FolderError: no safetensors, or tensors that loading makes of others.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    if folder is None:
        raise FolderError("its files are not at hand")
    try:
        on_disk = shards.read_directory(folder)
    except FolderError as fault:
        raise FolderError(str(fault)) from fault
    transforms = get_model_conversion_mapping(net)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    prefix, state = net.base_model_prefix, net.state_dict()
    found: dict[str, Place] = {}
    for key, slot in on_disk.items():
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:
            name, pattern = rename_source_key(key, [], [], prefix, state)
        if name not in state:
            continue
        if pattern is not None or name in found or name.endswith("_extra_state"):
            raise FolderError(f"{name} is made of several of the checkpoint's tensors, or otherwise than it lies there")
        found[name] = key, slot
    return found


def _loaded(value: Tensor, old: Tensor) -> Tensor:
    """A tensor in the place of another, with transformers' mark of one that a checkpoint held."""
    new = nn.Parameter(value, value.is_floating_point()) if isinstance(old, nn.Parameter) else value
    vars(new)["_is_hf_initialized"] = True
    return new


def _at(net: nn.Module, name: str) -> Tensor:
    module, leaf = net.get_submodule(owner(name)), name.rpartition(".")[2]
    found = module._parameters.get(leaf)
    return found if found is not None else module._buffers[leaf]  # type: ignore[return-value]


def keep_shared(model: nn.Module, trained: Collection[str]) -> None:
    """Let DDP leave alone what does not train: it would write the first process's values over every other's.

    The frozen weights of a checkpoint are the same everywhere, as pages of the file that the processes of a machine
    share; written to, they become a copy of one's own, as large as the model, after all of it has gone over the wire.

    Args:
        model: before DDP wraps it.
        trained: the names of the parameters that train.
    """
    kept = [name for name, parameter in model.named_parameters() if name not in trained and not parameter.requires_grad]
    kept += [name for name, _ in model.named_buffers()]
    vars(model)["_ddp_params_and_buffers_to_ignore"] = kept  # DDP's own name for it
