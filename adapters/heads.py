"""A pretrained head under a task's labels: kept where it answers them, begun anew where it answers others."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from adapters.options import field_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.contracts import Adapted, Task

GENERIC = re.compile(r"LABEL_\d+")  # transformers' name of an output that nobody named
SHOWN = 4  # labels that a line lists at most


def own_labels(model: PreTrainedModel, load: Mapping[str, Any], *, live: bool) -> tuple[str, ...]:
    """The label names of a model's own head, output by output; empty where it has none.

    A model that was loaded for a task carries the task's names already: its checkpoint's config tells the old ones.

    Args:
        model: the model.
        load: how its checkpoint was loaded.
        live: the caller's own model, whose config nobody has changed.
    """
    if live:
        found = model.config.id2label
    else:
        from transformers import PreTrainedConfig

        kept = {key: value for key, value in load.items() if key in ("revision", "token", "cache_dir")}
        document, _ = PreTrainedConfig.get_config_dict(str(model.name_or_path), **kept)
        found = document.get("id2label")
    names = {int(number): str(name) for number, name in (found or {}).items()}
    return tuple(names[number] for number in sorted(names))


def fitted(
    task: Task, model: PreTrainedModel, new: Collection[str], own: Sequence[str], *, live: bool
) -> tuple[Task, set[str], str]:
    """What becomes of a head that came with the model and has as many outputs as the task has labels.

    Args:
        task: with the labels that the outputs are to mean.
        model: with its head; a head for other labels begins anew in place, a live model's never does.
        new: the parameters that loading made new.
        own: the head's own labels, output by output.
        live: the caller's own model.

    Returns:
        The task, its labels in the order of a head that knows them; the parameters begun anew; a line to be said,
        empty where the head has nothing to do with labels, or is new.
    """
    config, head = task.config(), task.head(model)
    if "num_labels" not in config or "id2label" not in config or head & set(new):
        return task, set(), ""
    labels = tuple(config["id2label"].values())
    if len(own) != len(labels):  # a config that does not name its head's outputs
        own = [f"LABEL_{number}" for number in range(len(labels))]
    unnamed = all(GENERIC.fullmatch(name) for name in own)
    whose = "the model's" if live else "the backbone's"
    if set(own) == set(labels):
        if tuple(own) == labels:
            return task, set(), "" if live else f"{whose} own head for these labels is kept"
        ordered: Any = task
        said = f"{whose} own head for these labels is kept, in its order: {_listed(own)}"
        return replace(ordered, labels=tuple(own)), set(), said
    if live and unnamed:
        return task, set(), ""  # the caller has just made it, or knows it
    if live or unnamed:
        renamed = _listed([f"{old} -> {label}" for old, label in zip(own, labels, strict=True)])
        return task, set(), f"{whose} own head of {len(labels)} outputs is kept: {renamed}"
    _begin_anew(model, head)
    return (
        task,
        head,
        (
            f"the backbone's head is for other labels ({_listed(own)}) than the task's ({_listed(labels)}): "
            "a new one takes its place"
        ),
    )


def first_values(model: PreTrainedModel, names: Collection[str]) -> dict[str, str]:
    """What tells whether parameters are as they began: digests of their bytes, by their own names."""
    import xxhash

    from adapters.anatomy import own_name
    from adapters.shards import tensor_bytes

    return {
        own_name(name): xxhash.xxh3_128_hexdigest(tensor_bytes(parameter.detach()))
        for name, parameter in model.named_parameters()
        if own_name(name) in names
    }


def is_new(adapted: Adapted) -> bool:
    """Whether there is a new head, as `adapt` made it, of a task whose loss is one over its outputs."""
    if "layer" not in field_names(type(adapted.task)) or not adapted.record.first:
        return False
    # Else it has been trained, or given other values.
    return first_values(adapted.model, adapted.record.first) == adapted.record.first


def _begin_anew(model: PreTrainedModel, head: Collection[str]) -> None:
    """First values for a head as transformers gives them to one that a checkpoint lacks."""
    import torch

    with torch.no_grad():
        for path in sorted({name.rpartition(".")[0] for name in head}):
            module = model.get_submodule(path)
            for parameter in module.parameters(recurse=False):
                # transformers leaves alone what it has loaded, and knows it by this mark.
                vars(parameter)["_is_hf_initialized"] = False
            model._init_weights(module)  # type: ignore[no-untyped-call]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
