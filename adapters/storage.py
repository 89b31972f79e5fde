"""One small-file format for every strategy: `save` writes an adapter folder, `load` opens and verifies it.

An adapter folder holds the trained tensors, a manifest written last that has the digest of every other file, and
the processor's files. Nothing in it is code, and the backbone is not in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import bare, disk, facts, injection, marks, pooling, progress, ranks, sharded, shards
from adapters.adapt import STRATEGIES, assemble, from_peft, row_of, task_class
from adapters.backbones import PROCESSORS, config_at_hand, live_model, open_processor
from adapters.card import card
from adapters.contracts import Adapted, Record, Strategy, Task, Vocabulary
from adapters.errors import AdaptersError, BackboneError, FolderError, NumbersError, RequestError, message
from adapters.manifest import (
    CARD,
    FORMAT,
    MANIFEST,
    RECIPE,
    RUN_MARK,
    WEIGHTS,
    backbone_name,
    fetch,
    read_manifest,
    read_tensors,
    refuse_gone,
    refuse_other_backbone,
    seal,
)
from adapters.manifest import refuse_foreign as refuse_foreign
from adapters.options import make
from adapters.recognition import refuse_kind
from adapters.vocabulary import of_manifest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.fingerprint import Fingerprint

logger = logging.getLogger(__name__)

MAX_RECIPE = 1 << 20  # bytes
LEVELS = ("strict", "fast", "off")


# ---------------------------------------------------------------------- writing


def save(adapted: Adapted, folder: str | Path) -> Path:
    """Write an adapter folder: trained tensors, manifest, processor, model card.

    Works at any time, trained or not. A folder that holds an adapter of ours is replaced whole; anything else that
    is already there is refused. Where the model is divided over processes (FSDP), all of them call this: the trained
    tensors are gathered, and the first process writes.

    Returns:
        The folder.

    Raises:
        FolderError: the folder holds something else.
        DiskError: the disk is full or fails; the old folder is whole then, or the error says that the new one is.
        NumbersError: a trained tensor is not finite.
    """
    target = Path(folder).expanduser()
    refuse_foreign(target)
    adapted.state()  # a spent adapter speaks before anything is written
    if sharded.is_divided(adapted):
        with sharded.gathered(adapted):
            ranks.by_first(lambda: _save(adapted, target))
    else:
        _save(adapted, target)
    return target


def _save(adapted: Adapted, target: Path) -> None:
    with progress.Job("saving the adapter"), disk.writing(target), disk.staged(target) as stage:
        write(adapted, stage)


def write(adapted: Adapted, folder: Path) -> None:
    """Write an adapter's files into an existing, empty folder; manifest last, then everything is read back."""
    import torch

    held = dict(sorted(adapted.state().items()))
    sharded.refuse_parts(held, str(folder))
    state = {name: tensor.contiguous().cpu() for name, tensor in held.items()}
    for name, tensor in state.items():
        if not bool(torch.isfinite(tensor).all()):
            raise NumbersError(
                message(
                    "a trained tensor is not finite and is not saved",
                    where=name,
                    found=f"{int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values",
                    remedy="Take the last good checkpoint, or a smaller learning rate.",
                )
            )
    shards.save_tensors(folder / WEIGHTS, state, {"format": "pt", "holdfast": str(FORMAT)})
    elsewhere = pooling.placed(adapted.model).elsewhere  # peft would open it, and answer otherwise
    record = adapted.record
    beside = facts.sidecars(adapted.strategy, adapted.vocabulary, record.backbone, record.revision)
    misread = next(filter(None, (injection.misread(adapted.model, config) for config in beside.values())), "")
    if misread:
        remark = f"no adapter_config.json was written: {misread}"
        record.notes += [remark] if remark not in record.notes else []
        logger.warning(remark)
    for name, document in ({} if elsewhere or misread else beside).items():
        shards.write_text(folder / name, json.dumps(document, indent=2, sort_keys=True) + "\n")
    if adapted.processor is not None:
        adapted.processor.save_pretrained(folder)
        facts.keep_input_names(adapted.processor, folder)
        facts.without_code(folder)
    if adapted.record.recipe:
        import yaml

        text = yaml.safe_dump(adapted.record.recipe, sort_keys=False, allow_unicode=True)
        shards.write_text(folder / RECIPE, f"{RUN_MARK}\n{text}")
    document = facts.of(adapted, state)
    shards.write_text(folder / CARD, card(adapted, document))
    seal(folder, document)
    record.folders[document["digest"]] = marks.content(document["tensors"])


# ---------------------------------------------------------------------- reading


def strategy_of(document: Mapping[str, Any], where: str) -> Strategy:
    """The resolved strategy of a manifest.

    Raises:
        FolderError: a strategy that is not known here, or options that it does not have.
    """
    name = document["strategy"]["name"]
    rows = {row_of(key).strategy.name: row_of(key).strategy for key in STRATEGIES}
    if name not in rows:
        raise FolderError(
            message(
                f"the adapter's strategy {name!r} is not known here",
                where=where,
                expected=f"one of {', '.join(sorted(rows))}",
                remedy="Import the package that adds it to adapters.STRATEGIES.",
            )
        )
    strategy: Strategy = _remade(rows[name], document["strategy"]["options"], where)
    return strategy


def task_of(document: Mapping[str, Any], where: str) -> Task:
    """The task of a manifest, labels included."""
    task: Task = _remade(task_class(document["task"]["name"]), document["task"]["options"], where)
    return task


def _remade(kind: type[Any], options: Mapping[str, Any], where: str) -> Any:
    try:
        return make(kind, options, where)
    except RequestError as fault:
        raise FolderError(message("options that this version does not know", where=where, found=fault)) from fault


def load(
    folder_or_hub_id: str | Path, model: str | Path | PreTrainedModel | None = None, *, verify: str = "strict"
) -> Adapted:
    """Open an adapter folder on its backbone.

    Args:
        folder_or_hub_id: what `save` wrote, or a plain peft folder.
        model: the backbone: an id, a folder, or a live model; None takes the one that the adapter names.
        verify: "strict" compares every byte of the backbone, "fast" samples of each tensor, "off" nothing.

    Returns:
        The adapted model, in eval mode; training can go on.

    Raises:
        FolderError: the folder is damaged, edited, foreign, or from a newer version.
        BackboneError: the backbone is another one; the message names the tensors that differ.
    """
    if verify not in LEVELS:
        raise RequestError(message(f"unknown verify {verify!r}", where="verify", expected=", ".join(LEVELS)))
    folder = fetch(folder_or_hub_id)
    if not (folder / MANIFEST).exists() and (folder / bare.CONFIG).is_file():
        return _load_bare(folder, model, verified=verify != "off")
    document = read_manifest(folder)
    where = str(folder / MANIFEST)
    tensors = read_tensors(folder, document)
    saved_strategy = strategy_of(document, where)
    task = task_of(document, where)
    vocabulary = of_manifest(document, where)
    backbone = document["backbone"]
    base: Any = model if model is not None else backbone_name(document, folder)
    options: dict[str, Any] = dict(backbone["load"]) if model is None else {}
    if model is None and backbone["revision"]:
        options["revision"] = backbone["revision"]
    if base is None:
        raise RequestError(
            message(
                "the adapter was made on a live model without a name",
                where=str(folder),
                remedy="Give the backbone: load(folder, model=...).",
            )
        )
    if model is None:
        refuse_gone(document, str(folder))
    if verify != "off":
        refuse_other(document, base, options, str(folder))

    accept = acceptance(document, str(folder), tensors, saved_strategy, vocabulary, verified=verify != "off")
    from adapters.fingerprint import Fingerprint

    # Where 4-bit weights cannot be identified, "off" takes the user's word that they are the recorded backbone's.
    claimed = Fingerprint.from_json(backbone["fingerprint"]) if verify == "off" else None
    adapted = assemble(
        base,
        saved_strategy,
        task,
        _quantization_for(base, backbone["quantization"]),
        options,
        saved_processor(folder, document, task),
        int(document["seed"]),
        accept=accept,
        full=verify == "strict",
        added_tokens=vocabulary.tokens if vocabulary is not None else (),
        claimed=claimed,
    )
    if vocabulary != adapted.vocabulary:
        raise FolderError(
            message(
                "the added tokens do not come out as they were saved",
                where=where,
                expected=f"ids {vocabulary.ids[:3] if vocabulary else ()}",
                found=f"ids {adapted.vocabulary.ids[:3] if adapted.vocabulary else ()}",
            )
        )
    put(adapted, tensors, str(folder))
    fill_record(adapted.record, document, folder)
    _keep_digest(adapted, document["digest"], document["tensors"])
    if adapted.fingerprint is claimed:
        note = "the backbone in 4 bits was not verified (verify='off')"
        adapted.record.notes += [note] if note not in adapted.record.notes else []
        logger.warning(note)
    return adapted


def refuse_other(document: Mapping[str, Any], base: Any, options: Mapping[str, Any], where: str) -> None:
    """Refuse a backbone, live or a name, of another architecture, or that the adapter was merged into already.

    Args:
        document: the adapter's manifest; where: its folder.
        base: the backbone; options: with which it will be loaded.

    Raises:
        BackboneError: its config says so.
    """
    place = type(base).__name__ if live_model(base) else str(base)
    config = config_at_hand(base, options)
    refuse_kind(document["backbone"], config, where, place)
    marks.refuse_marked(document, (document["digest"],), config, place)


def acceptance(
    document: Mapping[str, Any],
    where: str,
    tensors: Mapping[str, Tensor],
    strategy: Strategy,
    vocabulary: Vocabulary | None,
    *,
    verified: bool = True,
) -> Callable[[Strategy, Fingerprint, Mapping[str, tuple[int, ...]]], None]:
    """What compares a backbone with the one that an adapter was trained on, before anything changes.

    Args:
        document: the adapter's manifest.
        where: its folder.
        tensors: trained, by their keys; their shapes are compared.
        strategy: as it was saved.
        vocabulary: the tokens that it added.
        verified: False takes any backbone whose modules fit.
    """

    def accept(found_strategy: Strategy, found: Fingerprint, trained: Mapping[str, tuple[int, ...]]) -> None:
        if facts.plain(facts.options_of(found_strategy)) != facts.plain(facts.options_of(strategy)):
            raise BackboneError(
                message(
                    "the strategy would change other modules of this backbone than it did when it was trained",
                    where=where,
                    expected=document["backbone"]["model_class"],
                    found=f"other modules for strategy {strategy.name!r}",
                )
            )
        if verified:
            refuse_other_backbone(document, found, where)
        _refuse_shapes(tensors, trained, vocabulary, where)

    return accept


def _refuse_shapes(
    tensors: Mapping[str, Tensor], trained: Mapping[str, tuple[int, ...]], vocabulary: Vocabulary | None, where: str
) -> None:
    """Compare the adapter's tensors with what the strategy would train, while the live model is still untouched.

    Added tokens come later: what grows with them is left to `put`.
    """
    grown = tuple(vocabulary.whole) if vocabulary is not None else ()
    for name, shape in trained.items():
        if name in tensors and tuple(tensors[name].shape) != shape and not name.endswith(grown):
            raise FolderError(
                message(
                    "a tensor of another shape",
                    where=f"{where}: {name}",
                    expected=shape,
                    found=tuple(tensors[name].shape),
                )
            )


def _quantization_for(base: Any, quantization: str | None) -> str | None:
    """A live model that is packed already is taken as it is."""
    if quantization is None or not live_model(base):
        return quantization
    from adapters.quantize import packed_modules

    return None if packed_modules(base) else quantization


def saved_processor(folder: Path, document: Mapping[str, Any], task: Task) -> Any:
    if not set(PROCESSORS[task.processor][1]) & set(document["files"]):
        return None
    try:
        return open_processor(task.processor, str(folder), {})
    except AdaptersError:
        raise
    except Exception as fault:  # tokenizers raises bare exceptions for a vocabulary that it cannot read
        raise FolderError(
            message(
                f"the adapter's {PROCESSORS[task.processor][0]} cannot be opened",
                where=str(folder),
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:300],
            )
        ) from fault


def put(adapted: Adapted, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copy an adapter's tensors into the live parameters that they belong to, all or none.

    Raises:
        FolderError: a tensor too many, too few, or of another shape.
    """
    import torch

    places = {key: (tensor, axis) for key, tensor, axis in adapted.places()}
    wanted = adapted.state()
    odd = sorted(set(wanted) ^ set(tensors))
    if odd:
        raise FolderError(
            message(
                "the adapter's tensors are not those that the strategy trains here",
                where=where,
                expected=f"{len(wanted)} tensors",
                found=f"{len(tensors)}, differing in {', '.join(odd[:3])}",
            )
        )
    for name, tensor in tensors.items():
        if wanted[name].shape != tensor.shape:
            raise FolderError(
                message(
                    "a tensor of another shape",
                    where=f"{where}: {name}",
                    expected=tuple(wanted[name].shape),
                    found=tuple(tensor.shape),
                )
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            live, axis = places[name]
            if axis is None:
                live.copy_(ranks.laid(tensor, live))
            else:
                live.index_copy_(axis, adapted.added_ids(live), tensor.to(live))


def _keep_digest(adapted: Adapted, digest: str, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """Take down from which adapter the live tensors are; those of another dtype than the file's are described anew."""
    state = adapted.state()
    alike = all(str(state[name].dtype) == f"torch.{entry['dtype']}" for name, entry in tensors.items())
    adapted.record.folders[digest] = marks.content(tensors if alike else facts.described(dict(sorted(state.items()))))


def fill_record(record: Record, document: Mapping[str, Any], folder: Path) -> None:
    """What a manifest tells of the adapter's past."""
    record.new = tuple(document["new"])
    record.data, record.metrics = document["data"], document["metrics"]
    record.settings, record.notes = document["settings"], list(document["notes"])
    record.why_not = document.get("why_not_reproducible", record.why_not)
    recipe = folder / RECIPE
    if document["reproducible"] and recipe.is_file():
        record.recipe = _recipe(recipe)


def _recipe(file: Path) -> dict[str, Any]:
    """The recipe that lies beside an adapter; people edit it, so it is read and not trusted.

    Raises:
        FolderError: no YAML mapping.
    """
    import yaml

    if file.stat().st_size > MAX_RECIPE:
        raise FolderError(message("a file too large to be a recipe", where=str(file), remedy="Delete the file."))
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError) as fault:
        raise FolderError(
            message("broken YAML", where=str(file), found=" ".join(str(fault).split())[:200], remedy="Delete the file.")
        ) from fault
    if not isinstance(found, dict):
        raise FolderError(message("not a recipe", where=str(file), expected="keys and values"))
    return found


def _load_bare(folder: Path, model: Any, *, verified: bool) -> Adapted:
    """A folder that peft itself wrote: it names no backbone that could be verified."""
    config, tensors = bare.read(folder)
    digest = bare.digest(folder)
    if model is None or not live_model(model):
        raise RequestError(
            message(
                "a peft folder does not say what the backbone's head answers",
                where=str(folder),
                remedy="Load the backbone with its head (AutoModelForSequenceClassification...) and give it as model=.",
            )
        )
    from adapters.adapt import adapt

    if verified:
        marks.refuse_marked(None, (digest,), config_at_hand(model, {}), type(model).__name__)
    logger.warning(
        "%s is a plain peft folder: it does not say on which backbone it was trained, so that cannot be verified",
        folder,
    )
    adapted = adapt(model, from_peft(config))
    parameters = dict(adapted.model.named_parameters())
    for name in adapted.trained:  # a head that peft did not train is the live model's own
        key = adapted.strategy.key(name)
        if key not in tensors and name in adapted.head:
            tensors[key] = parameters[name].detach().clone()
    put(adapted, tensors, str(folder))
    _keep_digest(adapted, digest, facts.described(dict(sorted(adapted.state().items()))))
    return adapted
