"""A plain peft folder merged into its base by peft itself: a checkpoint, whatever its method.

Some methods keep tensors that all layers share in peft's own model (VeRA, VB-LoRA). They cannot be put in place layer
by layer here, but peft merges them, and what a merge did can be extracted.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from adapters import bare, deferred, disk, marks, shards
from adapters.backbones import MAX_CONFIG, TOKENIZER_FILES, check_folder, hushed, local_folder
from adapters.errors import AdaptersError, FolderError, RequestError, message
from adapters.injection import PREFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

AUTO: Final = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
}
CLASSES: Final = ("SEQ_CLS", "TOKEN_CLS")  # whose head's size the base does not say
THEMSELVES: Final = "Merge it with peft, save the model, and extract from the two checkpoints: BASE MERGED."


def is_peft(folder: Path) -> bool:
    """Whether a folder is peft's and no checkpoint."""
    return (folder / bare.CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(folder: Path) -> str:
    """What the folder says that its base is called.

    Raises:
        RequestError: nothing.
    """
    config, _ = bare.read(folder)
    name, revision = str(config.base_model_name_or_path or ""), config.revision
    found = local_folder(name, {"revision": revision}) if revision else None
    if not name:
        raise RequestError(
            message("a peft folder that names no base", where=str(folder / bare.CONFIG), remedy="Give base=folder.")
        )
    return str(found or name)


def merged(folder: Path, base: Path, place: Path, out: Path) -> Path:
    """Open the base in float32, let peft put the adapter on it and merge it, and save the model.

    Args:
        folder: plain peft's.
        base: the folder of its base.
        place: an existing, empty folder; out: what is written at last, for messages.

    Returns:
        `place`, a plain transformers folder.

    Raises:
        FolderError: no peft folder that can be read safely, tensors that peft does not take.
        RequestError: a method that merges nowhere, no model class for it, a head that neither of both has.
        BackboneError: the adapter was merged into this base already.
        DiskError: the disk is full or fails.
    """
    deferred.import_peft()
    import peft

    config, tensors = bare.read(folder)
    check_folder(base)
    marks.refuse_marked(None, (bare.digest(folder),), shards.read_json(base / "config.json", MAX_CONFIG), str(base))
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning:
        raise RequestError(
            message("a method that changes no weight and merges nowhere", where=f"{folder}: {kind}", remedy="Serve it.")
        )
    net = _opened(config, tensors, folder, base)
    try:
        with deferred.unpacked(), warnings.catch_warnings(), hushed():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(net, str(folder))
            _refuse_lost(model, tensors, folder)
            whole: Any = model.merge_and_unload()
    except AdaptersError:
        raise
    except (ValueError, TypeError, NotImplementedError, RuntimeError, LookupError, AttributeError) as fault:
        raise RequestError(
            message(
                "peft does not merge this adapter into this base",
                where=f"{folder} ({kind}), {base}",
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:200],
                remedy="Give the base that it was trained on, and a method that merges.",
            )
        ) from fault
    with disk.writing(out), hushed():
        whole.save_pretrained(place)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shards.copy(folder / name, place / name)
    return place


def _opened(config: Any, tensors: Mapping[str, Tensor], folder: Path, base: Path) -> Any:
    """The base with the head that the adapter brings, float32.

    Raises:
        RequestError: no model class is named, or the head would be another one each time.
    """
    import torch
    import transformers

    settings = transformers.AutoConfig.from_pretrained(base, trust_remote_code=False)
    named = AUTO.get(str(config.task_type)) or next(iter(settings.architectures or ()), "")
    kind: Any = getattr(transformers, named, None)
    if kind is None:
        raise RequestError(
            message(
                "neither the adapter nor its base says which model class it belongs to",
                where=f"{folder / bare.CONFIG}: task_type; {base / 'config.json'}: architectures",
                expected=", ".join(AUTO),
                found=f"{config.task_type}, {named or 'nothing'}",
                remedy=THEMSELVES,
            )
        )
    saved = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
    auto = hasattr(kind, "from_config")
    with torch.device("meta"), hushed():
        ghost = kind.from_config(settings) if auto else kind(settings)
    sizes = [
        saved[name].shape[0]
        for name, value in ghost.named_parameters()
        if name in saved and saved[name].shape[1:] == value.shape[1:] and value.shape[0] == settings.num_labels
    ]
    if config.task_type in CLASSES and sizes and sizes[-1] != settings.num_labels:
        settings.num_labels = sizes[-1]
    with torch.random.fork_rng(devices=[]), hushed():
        net, told = kind.from_pretrained(
            base,
            config=settings,
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    new = set(told["missing_keys"]) | {entry[0] for entry in told["mismatched_keys"]}
    if random := sorted(new - set(saved)):
        raise RequestError(
            message(
                "tensors that neither the adapter nor its base holds",
                where=f"{folder}, {base}",
                expected=f"all tensors of {type(net).__name__}",
                found=f"{len(random)} that are missing: {', '.join(random[:3])}",
                remedy="Give the base with its head, or " + THEMSELVES[0].lower() + THEMSELVES[1:],
            )
        )
    return net


def _refuse_lost(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """peft leaves out what it has no place for, and what it lacks stays as it was: both without an error.

    Raises:
        FolderError: naming the tensors.
    """
    import peft
    import torch

    held = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    live = model.state_dict()
    odd = sorted(set(held) - set(tensors))
    odd += [key for key in set(tensors) - set(held) if key not in live or not torch.equal(live[key], tensors[key])]
    if odd:
        raise FolderError(
            message(
                "peft does not take the folder's tensors as they are",
                where=str(folder),
                expected=f"{len(held)} tensors",
                found=f"{len(tensors)}, differing in {', '.join(odd[:3])}",
                remedy="Give the base that it was trained on.",
            )
        )
