"""A model with fewer blocks that plain transformers opens: its config, its module list, its tensors on disk.

Which field of a config counts the blocks is not known by name: each number that equals their count is tried, and the
right one gives a model whose tensors are those of the blocks that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from adapters.anatomy import backbone_state, block_lists, own_name, plain_name, saved_names
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Place = tuple[str, ...]  # of a field in a config, through the configs inside it


@final
@dataclass(frozen=True)
class Shortening:
    """What makes a model shorter.

    Attributes:
        blocks: the path of its module list.
        layer: how many blocks stay.
        config: the config's fields that change: place -> new value (the count, and lists with an entry a block).
        left_out: the tensors that go, by their names on disk without the base model's prefix.
    """

    blocks: str
    layer: int
    config: Mapping[Place, Any]
    left_out: frozenset[str]


def planned(model: PreTrainedModel, layer: int) -> Shortening | None:
    """How this model becomes one of `layer` blocks; None where no field of its config says how many there are.

    Args:
        model: live, or a skeleton on the meta device; it is not touched.
        layer: how many blocks stay, the lowest.
    """
    lists = block_lists(model)
    if len(lists) != 1 or lists[0].shared:
        return None
    path = lists[0].path
    modules: Any = model.get_submodule(path)
    depth = len(modules)
    if layer >= depth:
        return Shortening(path, depth, {}, frozenset())
    above = tuple(f"{path}.{index}." for index in range(layer, depth))
    wanted = {name for name in model.state_dict() if not name.startswith(above)}
    wanted = {own_name(name) for name in wanted}
    document = model.config.to_dict()
    for place in _counts(document, depth):
        changes = {place: layer} | _lists(document, place[:-1], depth, layer)
        cut = skeleton_of(model, changes)
        if cut is not None and set(cut.state_dict()) == wanted:
            whole = skeleton_of(model, {})
            if whole is None:
                return None
            return Shortening(path, layer, changes, frozenset(_on_disk(whole) - _on_disk(cut)))
    return None


def skeleton_of(model: PreTrainedModel, changes: Mapping[Place, Any]) -> PreTrainedModel | None:
    """A model of this class and a changed config on the meta device; None where there is none."""
    config = copy.deepcopy(model.config)
    try:
        made = type(config).from_dict(changed(config.to_dict(), changes))
        with torch.device("meta"):
            return type(model)(made)
    except Exception:  # configs validate themselves in many ways, and model code may raise anything
        return None


def changed(document: Mapping[str, Any], changes: Mapping[Place, Any]) -> dict[str, Any]:
    """A config as JSON holds it, with other values at some places."""
    result = copy.deepcopy(dict(document))
    for place, value in changes.items():
        inner = result
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = value
    return result


def of_folder(source: Path, document: Mapping[str, Any], layer: int) -> Shortening | None:
    """The same for the backbone in a folder, read as the class of an adapter's manifest; no weight is read."""
    import transformers

    kind: Any = getattr(transformers, document["backbone"]["model_class"], None)
    if kind is None:
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = kind(config)
    except Exception:  # a class that cannot be built without weights, or code of its own
        return None
    return planned(model, layer)


def shorten(model: PreTrainedModel, layer: int) -> None:
    """Take the blocks above `layer` out of a live model, and say so in its config.

    Raises:
        RequestError: no field of its config says how many blocks there are.
    """
    found = planned(model, layer)
    if found is None:
        raise RequestError(
            message(
                "no field of the config says how many blocks the model has",
                where=type(model).__name__,
                remedy="Merge on disk (adapters.merge_on_disk): it writes the backbone with its head beside it.",
            )
        )
    if not found.config:
        return
    kept: Any = model.get_submodule(found.blocks)
    model.set_submodule(found.blocks, kept[:layer])
    old: Any = type(model.config).from_dict(model.config.to_dict())
    new: Any = type(model.config).from_dict(changed(model.config.to_dict(), found.config))
    live: Any = model.config
    for name in next(iter(found.config))[:-1]:
        old, new, live = getattr(old, name), getattr(new, name), getattr(live, name)
    for name, value in vars(new).items():  # what follows from the count changes with it
        if value != vars(old).get(name) and not isinstance(value, type(model.config)):
            vars(live)[name] = value


def _counts(document: Mapping[str, Any], depth: int, above: Place = ()) -> Iterator[Place]:
    """The places of a config's numbers that equal the count of blocks; those that are called so first."""
    names = [name for name, value in document.items() if type(value) is int and value == depth]
    for name in sorted(names, key=lambda name: ("layer" not in name, name)):
        yield (*above, name)
    for name, value in document.items():
        if isinstance(value, dict) and "model_type" in value:
            yield from _counts(value, depth, (*above, name))


def _lists(document: Mapping[str, Any], inside: Place, depth: int, layer: int) -> dict[Place, Any]:
    """The lists of the same config that name blocks, cut."""
    for key in inside:
        document = document[key]
    cut = {
        (*inside, name): list(value[:layer])
        for name, value in document.items()
        if isinstance(value, list | tuple) and len(value) == depth and name != "architectures"
    }
    # Which blocks a backbone for pictures gives out besides: its last one, as where nothing is said.
    return cut | {(*inside, name): None for name in ("out_features", "out_indices") if document.get(name)}


def _on_disk(model: PreTrainedModel) -> set[str]:
    _, tensors = saved_names(model, backbone_state(model, ()))
    return {plain_name(name, model.base_model_prefix) for name in tensors}
