"""A backbone without its weights: the model class on the meta device, from a config alone.

Nothing of the weights is read; of a checkpoint that is at hand only the headers are, to tell which parameters it
lacks. Where there is none, the class that the config names (`architectures`) tells that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor

from adapters import heads, places, pooling, reading, shards
from adapters.anatomy import backbone_state, copied, own_name, saved_names, skeleton
from adapters.backbones import check_config, hushed, live_model, local_folder
from adapters.contracts import Task
from adapters.errors import FolderError, RequestError, message
from adapters.tasks import refuse_classless

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@final
@dataclass(frozen=True)
class Blueprint:
    """A model without memory, ready for strategies to be tried on.

    Attributes:
        model: on the meta device.
        task: completed.
        head: own names of the head's parameters and of those that loading would make new.
        new: of these, what loading would make new.
        unread: own names of what the head's reading leaves out.
        name: id or folder, or the class of a live model.
        note: how it is known which parameters are new; empty for a live model.
    """

    model: PreTrainedModel
    task: Task
    head: frozenset[str]
    new: frozenset[str]
    unread: frozenset[str]
    name: str
    note: str = ""


def drawn(model: str | Path | PreTrainedModel, task: Task, load: Mapping[str, Any]) -> Blueprint:
    """The model that `adapt` would open for a task, without its weights.

    Args:
        model: an id, a folder (its config.json is enough), or a live model, which is not touched.
        task: with its labels, where it has any.
        load: what `from_pretrained` takes; of it dtype, attn_implementation, revision, token and cache_dir matter.

    Raises:
        RequestError: no such folder, no config, no head for this task, a head of another size.
        FolderError: a config that is too large, no JSON, or names code.
    """
    live = live_model(model)
    if live:
        net, new, note = skeleton(model), set[str](), ""  # type: ignore[arg-type]
    else:
        net, new, note = _from_config(model, task, dict(load))  # type: ignore[arg-type]
    task = task.complete(net)
    task, begun, _ = heads.fitted(task, net, new, heads.own_labels(net, load, live=live), live=live)
    new |= begun
    head = frozenset(task.head(net)) | frozenset(new)
    wanted = reading.of(task)
    # Zeros in the memory of one stand for the weights: where the head would read is a question of the graph.
    placed = pooling.planned(copied(net, _stretched), wanted) if wanted.elsewhere else None
    if placed is not None:
        pooling.put(net, placed)
    unread = placed.unread if placed is not None else frozenset[str]()
    name = type(net).__name__ if live else str(model)
    return Blueprint(net, task, head, frozenset(new), unread, name, note)


def _stretched(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _from_config(model: str | Path, task: Task, load: dict[str, Any]) -> tuple[PreTrainedModel, set[str], str]:
    import transformers

    name, folder = str(model), Path(model).expanduser()
    if not folder.is_dir() and (isinstance(model, Path) or places.is_path(name)):
        raise RequestError(
            message("there is no such model folder", where=name, remedy="Give a folder that is there, or a hub id.")
        )
    if folder.is_dir():
        name = str(folder)
        if not (folder / "config.json").exists():
            raise RequestError(message("not a model folder", where=name, expected="a config.json in it"))
        check_config(folder)
    kept = {key: value for key, value in load.items() if key in ("revision", "token", "cache_dir")}
    try:
        with hushed():  # other labels than the checkpoint's are the plan
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **kept, **task.config())
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as fault:
        raise RequestError(
            message(
                "the backbone's config cannot be read",
                where=name,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:300],
                remedy="Check the id or folder; offline, only local folders and cached ids open. A folder with the "
                "config.json alone is enough.",
            )
        ) from fault
    slots = _headers(local_folder(name, load))
    dtype = _dtype(load.get("dtype", "auto"), config, slots)
    auto: Any = getattr(transformers, task.auto_class)
    chosen = {key: load[key] for key in ("attn_implementation",) if str(load.get(key)) in ("eager", "sdpa")}
    try:
        with torch.device("meta"), hushed():
            net = auto.from_config(config, dtype=dtype, **chosen)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, ImportError, ZeroDivisionError) as fault:
        refuse_classless(name, task, load)
        said = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
        raise RequestError(message("no model can be made of this config", where=name, found=said)) from fault
    names = {parameter_name for parameter_name, _ in net.named_parameters()}
    if slots is not None:
        return net, _lacking(net, set(slots)), "which parameters are new is read off the checkpoint's headers"
    made = _architecture(config, dtype)
    if made is None:
        return net, task.head(net), "the config names no class of its checkpoint: the task's head is taken as new"
    there = _bare(made, {n for n, _ in made.named_parameters()})
    new = {n for n in names if next(iter(_bare(net, {n}))) not in there}
    if type(made) is not type(net):
        new |= task.head(net)
    return net, new, f"no weights are at hand: they are taken to be those of {type(made).__name__}"


def _bare(net: PreTrainedModel, names: set[str]) -> set[str]:
    """Names without the base model's prefix."""
    prefix = f"{net.base_model_prefix}."
    return {name.removeprefix(prefix) for name in names}


def _architecture(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel | None:
    """The class that the config says its checkpoint came from, without memory."""
    import transformers

    kind: Any = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if not hasattr(kind, "_from_config"):
        return None
    with torch.device("meta"), hushed(), contextlib.suppress(ValueError, TypeError, AttributeError, RuntimeError):
        made: PreTrainedModel = kind._from_config(config, dtype=dtype)
        return made
    return None


def _lacking(net: PreTrainedModel, found: set[str]) -> set[str]:
    """Parameters whose name on disk no header has, with or without the base model's prefix."""
    state = backbone_state(net, ())
    names, on_disk = saved_names(net, state)
    split = {name for name in state if name not in names}  # held in parts on disk, or tied to one that is
    bare = _bare(net, found)
    parameters = {own_name(name) for name, _ in net.named_parameters()}
    fused = any(name in found or name in bare for name in set(on_disk) - set(names.values()))
    return {
        name
        for name in parameters & set(state)
        if not (fused and name in split) and not _bare(net, {names.get(name, name)}) & (found | bare)
    }


def _headers(folder: Path | None) -> Mapping[str, shards.Slot] | None:
    """What a checkpoint folder holds by name; None where there is no safetensors checkpoint."""
    if folder is None:
        return None
    try:
        return shards.read_directory(folder)
    except FolderError:
        return None


def _dtype(wanted: Any, config: PreTrainedConfig, slots: Mapping[str, shards.Slot] | None) -> torch.dtype:
    """The dtype that loading would give: what was asked for, the config's, or the checkpoint's first floating one."""
    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted not in (None, "auto"):
        found = getattr(torch, str(wanted).removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise RequestError(message("unknown dtype", where="load: dtype", found=repr(wanted)))
        return found
    named = getattr(config, "dtype", None)
    if isinstance(named, torch.dtype) and wanted == "auto":
        return named
    if slots and wanted == "auto":
        for slot in slots.values():
            kind: torch.dtype = getattr(torch, slot.dtype)
            if kind.is_floating_point:
                return kind
    return torch.float32
