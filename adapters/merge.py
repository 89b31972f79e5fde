"""A plain transformers model again: edits applied in memory, or streamed from disk to disk.

The stream reads, edits and writes a few rows at a time, in several threads, whatever the size of the model, checks the
backbone's fingerprint as it passes, and reads back what it wrote. It imports torch, but neither peft (unless the
strategy's own merge needs it) nor a model.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import disk, exactness, interrupts, marks, parts, places, requantize, shards, standalone
from adapters.backbones import MAX_CONFIG, check_folder
from adapters.changes import base_folder, streamed_edits
from adapters.contracts import Adapted
from adapters.errors import FolderError, RequestError, message, nearest
from adapters.exactness import BOUNDS as BOUNDS
from adapters.exactness import Rounding
from adapters.manifest import fetch, is_standalone, read_manifest, refuse_changed
from adapters.rewrite import rewrite, single_threaded
from adapters.shortening import changed
from adapters.storage import task_of
from adapters.stream import plan
from adapters.vocabulary import all_edits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit
    from adapters.stream import Step

logger = logging.getLogger(__name__)

# Fields of the backbone's config that classes of answers, padding and added tokens set.
ONTO = ("training", "original")
CONFIG_FIELDS = {"num_labels", "id2label", "label2id", "problem_type", "pad_token_id", "vocab_size"}


@final
@dataclass(frozen=True)
class MergeReport:
    """What a merge on disk did and how exact it is.

    Attributes:
        output: the written folder.
        tensors: tensors written; edited: of these, changed by the adapter; created: of these, new.
        bytes: size of the weights written.
        dtype: dtype of the edited tensors.
        verified: edited tensors whose written bytes, read again, equal the edit computed again.
        max_difference, mean_difference: between the logits of the merged and the adapted model, absolute.
        agreement: share of rows whose best answer is the same.
        spread: standard deviation of the adapted model's logits.
        onto: "training" for the weights that the adapter was trained on, "original" for those of the checkpoint; they
            differ where it was trained on packed weights. `base` says it in words.
        quantization: the form that weights are packed into, or None; packed: how many are, kept: linear maps that are
            not.
        bound: the share of the spread that the difference had to keep; accepted: it did not, and that was accepted.
        beside: where the merge is onto the original weights, max_difference and agreement of one onto the training
            base.
        form: "plain" for a folder that transformers opens; "standalone" for a backbone with its head beside it, which
            `adapters.load` opens, because the head reads where the model class does not; `reason` says which.
        left_out: tensors of the backbone that are not in it, because they lie above the block that the head reads.
        logits_checked: False where the model does not fit into memory; then `skipped` says why.
    """

    output: str
    tensors: int
    edited: int
    created: int
    bytes: int
    dtype: str
    verified: int
    max_difference: float | None = None
    mean_difference: float | None = None
    agreement: float | None = None
    spread: float | None = None
    logits_checked: bool = False
    skipped: str = ""
    form: str = "plain"
    reason: str = ""
    left_out: int = 0
    onto: str = "training"
    base: str = ""
    quantization: str | None = None
    packed: int = 0
    kept: int = 0
    bound: float | None = None
    accepted: bool = False
    beside: dict[str, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


# ---------------------------------------------------------------------- in memory


def merge(adapted: Adapted) -> PreTrainedModel:
    """Put what was trained into the live model, take the adapters out, and return it: plain transformers again.

    `adapted` is spent afterwards.

    Where the head reads a lower block, those above it go, and the config says so.

    Raises:
        RequestError: packed storage, into which a merge is lossy; a head whose pooling is not its class's own, which a
            plain model would forget when it is saved.
        SpentError: merged already.
    """
    import torch

    from adapters import pooling, shortening

    state = {name: tensor.clone() for name, tensor in adapted.state().items()}
    if adapted.storage.quantization is not None:
        raise RequestError(
            message(
                "a merge into packed weights is lossy",
                where=f"quantization {adapted.storage.quantization!r}",
                remedy="Save the adapter and merge it into the full-precision backbone: "
                f"adapters.merge_on_disk(folder, output), with quantization={adapted.storage.quantization!r} to have "
                "it packed again, measured.",
            )
        )
    model = adapted.model
    read = pooling.placed(model)
    if not read.plain:
        raise RequestError(
            message(
                "a plain transformers model cannot say where this head reads",
                where=f"{type(model).__name__}, pooling {read.pooling!r}",
                remedy="Save the adapter and merge it on disk: adapters.merge_on_disk(folder, output) writes the "
                "backbone with its head beside it, which adapters.load opens.",
            )
        )
    edits = all_edits(adapted.vocabulary, adapted.strategy, state)
    adapted.strategy.strip(model)
    if read.layer is not None:
        shortening.shorten(model, read.layer)
    tensors: dict[str, Tensor] = dict(model.named_buffers()) | dict(model.named_parameters())
    unknown = sorted(set(edits) - set(tensors))
    if unknown:
        raise RequestError(message("trained tensors that the model does not have", where=", ".join(unknown[:3])))
    with torch.no_grad():
        for name, edit in edits.items():
            old = tensors[name]
            old.copy_(edit(old.detach()).to(old.dtype))
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    adapted.record.spent = True
    return model


# ---------------------------------------------------------------------- on disk


def merge_on_disk(
    folder: str | Path,
    out: str | Path,
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    rows: list[Any] | None = None,
    check_logits: bool = True,
    quantization: str | None = None,
    onto: str = "training",
    accept: bool = False,
) -> MergeReport:
    """Write a plain transformers folder: the backbone with the adapter's edits in it.

    Args:
        folder: an adapter folder.
        out: the folder to write; must be new, empty, or a merge of ours.
        base: the backbone's folder, where it is not the one that the adapter names.
        dtype: of the written tensors, e.g. "bfloat16"; None keeps each tensor's own.
        rows: raw rows of the task (or texts) for the logits check; None makes synthetic ones.
        check_logits: compare the logits of the merged and the adapted model in a child process.
        quantization: "nf4", "fp4" or "int8" packs the merged weights, which rounds them; None leaves them whole.
        onto: for an adapter that was trained on packed weights: "training" merges onto what the packing made of them,
            "original" onto the checkpoint's own.
        accept: go on where rounding that was asked for moves the logits further than the bound, or is not measured.

    Returns:
        The report; its differences lie within the stated bound, or it says that they do not.

    Raises:
        BackboneError: the base is not the adapter's backbone, or has this adapter in it; nothing is left behind.
        FolderError: a damaged folder, or an output that holds something else.
        NumbersError: the written model does not answer as the adapted one does.
        RequestError: an unknown dtype, quantization or base; nothing to pack; a rounding that nobody measures.
    """
    _refuse_rows(rows)
    requantize.refuse_unknown(quantization)
    _refuse_onto(onto)
    adapter = fetch(folder)
    document = read_manifest(adapter)
    where = str(adapter)
    target = Path(out).expanduser()
    refuse_output(target)
    _refuse_config(document, where)
    with single_threaded():
        edits, in_file = streamed_edits(document, adapter)
    source = base_folder(document, base, where)
    check_folder(source)
    marks.refuse_marked(document, shards.read_json(source / "config.json", MAX_CONFIG), str(source))
    edits = parts.on_disk(edits, document, source)
    shape = _shape_of(document, source, where)
    if quantization is not None and shape.reason:
        raise RequestError(
            message(
                "a backbone with its head beside it is not packed",
                where=f"quantization={quantization!r}",
                found=shape.reason,
                remedy="Leave quantization out.",
            )
        )
    trained_in = document["backbone"]["quantization"]
    moved = trained_in if onto == "original" else None
    job = _Job(adapter, document, edits, source, shape, dtype, quantization)
    steps = job.steps(original=moved is not None)  # before anything is written: an unknown dtype, another backbone
    like = next((step.dtype for step in steps if step.edit is not None), steps[0].dtype)
    rounding = Rounding(like, quantization, moved)
    if not check_logits:
        exactness.refuse_blind(rounding, "check_logits=False", accept=accept)
    with interrupts.leaving(disk.outcome(target)), disk.staged(target) as stage:
        report = job.write(stage, steps, str(target), onto, _base_of(trained_in, moved))
        if in_file:
            refuse_changed(adapter, document)
        if not check_logits:
            return report
        skipped = exactness.too_large(max(document["backbone"]["bytes"], sum(step.nbytes for step in steps)))
        if skipped:
            exactness.refuse_blind(rounding, skipped, accept=accept)
            return _replaced(report, skipped=skipped)
        found = exactness.measured(adapter, stage, source, rows, str(target))
        bound = exactness.refuse_far(found, rounding, str(target), accept=accept)
        beside = _beside(job, stage, rows, str(target)) if moved is not None else None
        return _replaced(
            report,
            logits_checked=True,
            bound=rounding.bound(found.pop("dtype"))[0],
            accepted=found["max_difference"] > bound,
            beside=beside,
            **found,
        )


def _refuse_onto(onto: str) -> None:
    if onto not in ONTO:
        raise RequestError(message(f"unknown base {onto!r}", where="onto", remedy=nearest(str(onto), ONTO)))


def _base_of(trained_in: str | None, moved: str | None) -> str:
    """The base of a merge in words."""
    if trained_in is None:
        return "the weights that the adapter was trained on, the checkpoint's own"
    if moved is None:
        return f"what {trained_in} made of the weights, on which the adapter was trained"
    return f"the checkpoint's own weights; the adapter was trained on what {trained_in} made of them"


def _beside(job: _Job, stage: Path, rows: list[Any] | None, output: str) -> dict[str, float]:
    """How a merge onto the training base would answer: written beside, compared, and gone again."""
    place = stage / ".training"
    place.mkdir()
    job.write(place, job.steps(original=False), output, "training", "")
    found = exactness.measured(job.adapter, place, job.source, rows, output)
    shards.remove(place)
    return {name: found[name] for name in ("max_difference", "mean_difference", "agreement")}


@final
@dataclass(frozen=True)
class _Job:
    """One adapter on its way into one backbone.

    Attributes:
        adapter: its folder; document: its manifest.
        edits: by names that the checkpoint knows.
        source: the backbone's folder.
        shape: in which form the merge is written.
        dtype: of the written tensors, or None; quantization: the form that they are packed into, or None.
    """

    adapter: Path
    document: Mapping[str, Any]
    edits: Mapping[str, Edit]
    source: Path
    shape: _Shape
    dtype: str | None
    quantization: str | None

    def steps(self, *, original: bool) -> list[Step]:
        """The plan, onto the training base or the original one."""
        slots = shards.read_directory(self.source)
        left_out = self.shape.left_out
        return plan(self.document, self.edits, slots, self.dtype, str(self.source), left_out, original=original)

    def write(self, stage: Path, steps: list[Step], output: str, onto: str, base: str) -> MergeReport:
        """Everything into an existing folder; what is packed is written whole before, in a folder in it."""
        whole = stage / ".whole" if self.quantization is not None else stage
        whole.mkdir(exist_ok=True)
        with single_threaded() as threads:
            place, written, head = (
                (whole, steps, {}) if not self.shape.reason else _divided(whole, steps, self.document)
            )
            verified = rewrite(place, written, self.source, self.document, threads)
            _write_config(place, self.source, self.adapter, self.document, self.dtype, self.shape)
            if self.shape.reason:
                prefix = self.document["backbone"]["fingerprint"]["prefix"]
                facts = standalone.described(place, written, head, prefix, self.shape.task)
                standalone.write(whole, self.adapter, self.document, facts)
        edited = [step for step in written if step.edit is not None]
        report = MergeReport(
            output=output,
            tensors=len(written),
            edited=len(edited),
            created=sum(step.source is None for step in edited),
            bytes=sum(step.nbytes for step in written),
            dtype=edited[0].dtype if edited else written[0].dtype,
            verified=verified,
            form="standalone" if self.shape.reason else "plain",
            reason=self.shape.reason,
            left_out=len(self.shape.left_out),
            onto=onto,
            base=base,
            quantization=self.quantization,
        )
        if self.quantization is None:
            return report
        packing = requantize.planned(whole, self.document["backbone"]["model_class"], self.quantization)
        done = requantize.pack_folder(whole, stage, packing, report.dtype)
        shards.remove(whole)
        return _replaced(report, tensors=done.tensors, bytes=done.bytes, packed=done.packed, kept=done.kept)


@final
@dataclass(frozen=True)
class _Shape:
    """In which form a merge is written.

    Attributes:
        reason: why the head lies beside the backbone; empty where both are one plain model.
        config: changes of the backbone's config; left_out: its tensors that go, by the fingerprint's names.
        task: as it reads the written backbone.
    """

    reason: str
    config: Mapping[tuple[str, ...], Any]
    left_out: frozenset[str]
    task: Mapping[str, Any]


def _shape_of(document: Mapping[str, Any], source: Path, where: str) -> _Shape:
    from adapters import reading, shortening

    read = reading.of(task_of(document, where))
    found = shortening.of_folder(source, document, read.layer) if read.layer is not None else None
    reason = "" if read.plain else f"the head reads {read}, which {document['backbone']['model_class']} does not"
    if read.layer is not None and found is None and not reason:
        reason = f"no field of the config says how many blocks the model has, of which the head reads {read.layer}"
    if reason:
        logger.info("written as a backbone with its head beside it: %s", reason)
    options = dict(document["task"]["options"])
    if found is not None:
        options.pop("layer")
    return _Shape(
        reason,
        found.config if found is not None else {},
        found.left_out if found is not None else frozenset(),
        {**document["task"], "options": options},
    )


def _divided(stage: Path, steps: list[Step], document: Mapping[str, Any]) -> tuple[Path, list[Step], dict[str, Tensor]]:
    """The folder of the backbone, its tensors, and those of the head by their own names."""
    import torch

    names = document["backbone"]["names"]
    head = {names.get(name, name): name for name in document["head"]}
    place = stage / standalone.BACKBONE
    place.mkdir()
    beside = [step for step in steps if step.name in head]
    tensors = {head[s.name]: s.edit(None).to(getattr(torch, s.dtype)) for s in beside if s.edit is not None}
    return place, [step for step in steps if step.name not in head], tensors


def _refuse_config(document: Mapping[str, Any], where: str) -> None:
    """The merged model's config takes over what the task sets, and nothing that a manifest might plant there."""
    strangers = sorted(set(document["backbone"]["config"]) - set(task_of(document, where).config()) - CONFIG_FIELDS)
    if strangers:
        raise FolderError(
            message(
                "config fields that an adapter of this task does not set",
                where=where,
                expected=", ".join(sorted(CONFIG_FIELDS)),
                found=", ".join(strangers[:3]),
            )
        )


def _refuse_rows(rows: list[Any] | None) -> None:
    """The rows of the logits check go to another process as JSON."""
    try:
        json.dumps(rows)
    except TypeError as fault:
        raise RequestError(
            message(
                "rows of the logits check that are no plain values",
                where="rows",
                expected="texts, numbers, paths",
                found=fault,
                remedy="Give pictures by their files.",
            )
        ) from fault


def refuse_output(target: Path) -> None:
    """Refuse to write a merged model over anything but an earlier one.

    Raises:
        FolderError: the folder holds something else, or is no folder.
    """

    def ours(content: Sequence[str]) -> bool:
        if "config.json" in content:
            with contextlib.suppress(FolderError):
                return marks.MARK in shards.read_json(target / "config.json", MAX_CONFIG)
        return is_standalone(target)

    places.refuse_taken(target, ours, "a new or empty folder, or an earlier merge")


def _write_config(
    stage: Path, source: Path, adapter: Path, document: Mapping[str, Any], dtype: str | None, shape: _Shape
) -> None:
    """config.json with the task's labels, the source's generation config, the adapter's processor files."""
    backbone = document["backbone"]
    config = changed(shards.read_json(source / "config.json", MAX_CONFIG), shape.config)
    config |= {key: value for key, value in backbone["config"].items() if key != "num_labels"}
    if "num_labels" in backbone["config"] and "id2label" not in backbone["config"]:
        count = backbone["config"]["num_labels"]
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    config["architectures"] = [backbone["model_class"]]
    config[marks.MARK] = [*marks.of(config), document["digest"]]
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    shards.write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = source / "generation_config.json"
    if generation.is_file():
        shards.write_text(stage / generation.name, generation.read_text())
    if shape.reason:
        return  # the processor lies beside the head
    skipped = {"adapter_model.safetensors", "adapter_config.json"}
    for name in document["files"]:
        if name not in skipped:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shards.copy(adapter / name, stage / name)


def _replaced(report: MergeReport, **changes: Any) -> MergeReport:
    return MergeReport(**{**asdict(report), **changes})
