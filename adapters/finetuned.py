"""A fine-tuned checkpoint read beside its base, as an adapter does it: what became of each tensor of the backbone."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import disk, parts, shards, storage
from adapters.adapt import adapt, task_class
from adapters.anatomy import backbone_state, own_name, plain_name
from adapters.backbones import MAX_CONFIG, PROCESSORS, check_folder, hushed, local_folder, open_processor
from adapters.changes import Changes
from adapters.edits import Replace
from adapters.errors import BackboneError, FolderError, RequestError, message
from adapters.fingerprint import disk_slots
from adapters.manifest import read_manifest
from adapters.marks import MARK
from adapters.parts import Piece
from adapters.shards import Slot
from adapters.stored import Stacked, Stored
from adapters.tasks import task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from adapters.contracts import Adapted, Task
    from adapters.edits import Edit

# Fields of a config that a fine-tuning may set without changing what the weights mean.
INERT = frozenset(
    {
        *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
        *("id2label", "label2id", "num_labels", "problem_type", "pad_token_id", "finetuning_task", MARK),
    }
)


def read(base: str | Path, tuned: Path, scratch: Path, out: Path) -> tuple[Changes, list[str]]:
    """Two checkpoints of one architecture, as what the one did to the other.

    The base is opened once, as `adapt` opens it, and let go: its manifest, head and processor come from there. Of
    the fine-tuned one only headers are read here; its edits read a tensor when they are applied.

    Args:
        base: folder or cached hub id of the base.
        tuned: folder of the fine-tuned checkpoint.
        scratch: an existing, empty folder; the adapter that the result is like is written there.
        out: what is written at last, for messages.

    Returns:
        The changes, and remarks on what the configs disagree in.

    Raises:
        RequestError: different architectures, a model class without a task, a tensor that no adapter could hold.
        BackboneError: a tensor of another shape, one that only one of them has.
        FolderError: no safetensors weights.
    """
    source = base_folder(base)
    wanted, found = (_config(folder) for folder in (source, tuned))
    if wanted.get("model_type") != found.get("model_type"):
        raise RequestError(
            message(
                "checkpoints of different architectures",
                where=f"{source}, {tuned}",
                expected=wanted.get("model_type"),
                found=found.get("model_type"),
                remedy="Give the checkpoint that the fine-tuning began with.",
            )
        )
    remarks = _disagreements(wanted, found)
    for folder in (source, tuned):
        shards.read_directory(folder)  # pickles alone are refused here
    task = _task(tuned, found)
    load = {"dtype": "float32"} if wanted.get("dtype", wanted.get("torch_dtype")) == "float16" else {}
    adapted = adapt(str(base), "full", task=task, load=load, processor=_processor(task, tuned))
    labels, own = (getattr(one, "labels", ()) for one in (task, adapted.task))
    if labels != own:
        raise RequestError(
            message(
                "both checkpoints have a head for these labels, in another order",
                where=f"{source}, {tuned}",
                expected=list(own),
                found=list(labels),
                remedy="Give a base without a head.",
            )
        )
    edits = _edits(adapted, source, tuned)
    head = tuple(name for name in adapted.chosen if own_name(name) in adapted.head)
    with disk.writing(out):
        storage.write(dataclasses.replace(adapted, chosen=head or adapted.chosen[:1]), scratch)
    return Changes(scratch, read_manifest(scratch), edits), remarks


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one that plain transformers opens."""
    return (folder / "config.json").is_file()


def base_folder(base: str | Path) -> Path:
    """Where a base lies on this machine.

    Raises:
        RequestError: nowhere.
    """
    found = local_folder(str(base), {})
    if found is None:
        raise RequestError(message("there is no such backbone folder", where=str(base), remedy="Give base=folder."))
    return found


def _config(folder: Path) -> dict[str, Any]:
    check_folder(folder)
    found: dict[str, Any] = shards.read_json(folder / "config.json", MAX_CONFIG)
    return found


def _task(tuned: Path, config: Mapping[str, Any]) -> Task:
    """The task of the class that the checkpoint was saved from, its labels those of its config."""
    import torch
    import transformers

    name = next(iter(config.get("architectures") or ()), "")
    kind: Any = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise RequestError(
            message(
                "the config names no model class of transformers",
                where=f"{tuned / 'config.json'}: architectures",
                found=name or "nothing",
                remedy="Save the model with model.save_pretrained(folder).",
            )
        )
    settings = transformers.AutoConfig.from_pretrained(tuned, trust_remote_code=False)
    with torch.device("meta"), hushed():
        net = kind(settings)
    task: Task = task_class(task_of(net))()
    return task.complete(net)


def _processor(task: Task, tuned: Path) -> Any:
    """The tuned checkpoint's own tokenizer or image processor; None, which takes the base's, where it has none."""
    if any((tuned / file).is_file() for file in PROCESSORS[task.processor][1]):
        return open_processor(task.processor, str(tuned), {})
    return None


def _edits(adapted: Adapted, source: Path, tuned: Path) -> dict[str, Edit]:
    """Every tensor that trains in a full fine-tuning, as the tuned checkpoint has it."""
    net = adapted.model
    state = {name: tensor for name, tensor in backbone_state(net, ()).items() if name not in adapted.record.unread}
    ours, theirs = _by_memory(net, source), _by_memory(net, tuned)
    trained = {own_name(name) for name in adapted.trained}
    tokens = net.config.to_dict().get("vocab_size")
    faults, resized = [], set[int]()
    for name, tensor in state.items():
        slot = theirs.get(name)
        if slot is None:
            faults.append(f"{name}: missing")
        elif tuple(slot.shape) != tuple(tensor.shape):
            faults.append(f"{name}: shape {tuple(slot.shape)}, the base's {tuple(tensor.shape)}")
            grown = tensor.shape[:1] == (tokens,) and tuple(slot.shape[1:]) == tuple(tensor.shape[1:])
            resized.add(slot.shape[0] if grown else 0)
        elif name not in trained and isinstance(slot, Slot) and name in ours and _differ(ours[name], slot):
            faults.append(f"{name}: a running statistic that differs, which no adapter holds")
    used = {slot for found in theirs.values() for slot in _slots(found)}
    ignored = [re.compile(pattern) for pattern in net._keys_to_ignore_on_load_unexpected or ()]
    for name, slot in shards.read_directory(tuned).items():
        if slot not in used and "float" in slot.dtype and not any(pattern.search(name) for pattern in ignored):
            faults.append(f"{name}: not in {type(net).__name__} with the base's config")
    if faults:
        raise BackboneError(
            message(
                "the two checkpoints do not hold the same tensors",
                where=f"{source}, {tuned}",
                expected="the same names and shapes, the head apart",
                found=f"{len(faults)} that differ: {'; '.join(faults[:3])}",
                remedy="Give the checkpoint that the fine-tuning began with."
                if len(resized) != 1 or 0 in resized
                else "The vocabulary has another size: give a base with as many rows, "
                f"model.resize_token_embeddings({resized.pop()}) and save_pretrained(folder).",
            )
        )
    found = {name: theirs[name] for name in state if name in trained}
    return {name: Replace(Stored(slot) if isinstance(slot, Slot) else slot) for name, slot in found.items()}


def _slots(found: Slot | Stacked) -> list[Slot]:
    return [found] if isinstance(found, Slot) else [slot for _, _, slot in found.pieces]


def _by_memory(net: PreTrainedModel, folder: Path) -> dict[str, Slot | Stacked]:
    """Where the tensors lie by their names in memory; stacks of experts in their pieces.

    Raises:
        FolderError: several pieces stand for one tensor that is no stack, and they are no copies of each other.
    """
    held: dict[str, dict[str, Slot]] = {}
    for saved, (slot, name) in disk_slots(net, folder).items():
        held.setdefault(name, {})[saved] = slot
    state = backbone_state(net, ())
    shapes = {name: tuple(state[name].shape) for name, slots in held.items() if len(slots) > 1}
    stacks = parts.divided(net, {name: shape for name, shape in shapes.items() if len(shape) == 3})
    found: dict[str, Slot | Stacked] = {}
    for name, slots in held.items():
        first, *others = slots.values()
        if name in stacks:
            pieces = {plain_name(piece.name, net.base_model_prefix): piece for piece in stacks[name]}
            found[name] = _stack(pieces, slots, shapes[name], f"{folder}: {name}")
            continue
        if any(other.shape != first.shape or _differ(first, other) for other in others):
            raise FolderError(
                message(
                    "the checkpoint holds a tensor in other pieces than memory does",
                    where=f"{folder}: {name}",
                    expected="pieces that are the rows of a stack of experts, in their order",
                    found=f"{len(slots)} pieces",
                    remedy="Weights that are transposed or interleaved when they are loaded cannot be extracted.",
                )
            )
        found[name] = first
    return found


def _stack(pieces: Mapping[str, Piece], slots: Mapping[str, Slot], shape: tuple[int, ...], where: str) -> Stacked:
    """The stack that these pieces make up.

    Raises:
        BackboneError: there are others, or pieces of another shape.
    """
    sizes = {saved: (piece.stop - piece.start, shape[2]) for saved, piece in pieces.items()}
    odd = [f"{saved}: missing" for saved in sizes if saved not in slots]
    odd += [f"{saved}: one too many" for saved in slots if saved not in sizes]
    odd += [
        f"{saved}: shape {slot.shape}" for saved, slot in slots.items() if sizes.get(saved, slot.shape) != slot.shape
    ]
    if odd:
        raise BackboneError(
            message(
                "the two checkpoints do not hold the same tensors",
                where=where,
                expected=f"the {len(pieces)} pieces of a tensor of shape {shape}",
                found=f"{len(odd)} that differ: {'; '.join(odd[:3])}",
                remedy="Give the checkpoint that the fine-tuning began with.",
            )
        )
    placed = tuple((piece.entry, piece.start, slots[saved]) for saved, piece in pieces.items())
    return Stacked((shape[0], shape[1], shape[2]), placed)


def _differ(one: Slot | Stacked, other: Slot) -> bool:
    import torch

    if not isinstance(one, Slot):
        return True
    return not torch.equal(shards.read_tensor(one), shards.read_tensor(other).to(getattr(torch, one.dtype)))


def _disagreements(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> list[str]:
    """What an adapter cannot carry over: fields of the config that are no weights.

    Raises:
        RequestError: one of them ties its embeddings, the other does not.
    """
    missing = object()
    odd = sorted(name for name in {*base, *tuned} - INERT if base.get(name, missing) != tuned.get(name, missing))
    if "tie_word_embeddings" in odd and None not in (base.get("tie_word_embeddings"), tuned.get("tie_word_embeddings")):
        raise RequestError(
            message(
                "one of the checkpoints ties its embeddings, the other does not",
                where="config.json: tie_word_embeddings",
                expected=base["tie_word_embeddings"],
                found=tuned["tie_word_embeddings"],
                remedy="An adapter cannot untie them.",
            )
        )
    shown = [f"{name} {base.get(name)!r} -> {tuned.get(name)!r}" for name in odd if name in base and name in tuned]
    return [f"the configs differ, which the adapter does not carry over: {'; '.join(shown[:5])}"] if shown else []
