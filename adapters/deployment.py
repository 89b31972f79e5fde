"""What a merge writes: in which form, its weights, its config, and the report of it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import marks, requantize, shards, standalone
from adapters.backbones import MAX_CONFIG
from adapters.errors import FolderError, message
from adapters.facts import hand_on
from adapters.rewrite import rewrite, single_threaded
from adapters.shortening import changed
from adapters.storage import task_of
from adapters.stream import plan

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.edits import Edit
    from adapters.stream import Step

logger = logging.getLogger(__name__)

# Fields of the backbone's config that classes of answers, padding and added tokens set.
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
        remark: what is to be known of the check; empty for nothing.
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
    remark: str = ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


@final
@dataclass(frozen=True)
class Shape:
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


def shape_of(document: Mapping[str, Any], source: Path, where: str) -> Shape:
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
    return Shape(
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


def refuse_config(document: Mapping[str, Any], where: str) -> None:
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


@final
@dataclass(frozen=True)
class Deployment:
    """One adapter on its way into one backbone.

    Attributes:
        adapter: its folder; document: its manifest.
        edits: by names that the checkpoint knows.
        source: the backbone's folder.
        shape: in which form the merge is written.
        dtype: of the written tensors, or None; quantization: the form that they are packed into, or None.
        merged: digests of the adapters that the edits stand for.
    """

    adapter: Path
    document: Mapping[str, Any]
    edits: Mapping[str, Edit]
    source: Path
    shape: Shape
    dtype: str | None
    quantization: str | None
    merged: Sequence[str]

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
            _write_config(place, self.source, self.adapter, self.document, self.dtype, self.shape, self.merged)
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
        return replace(report, tensors=done.tensors, bytes=done.bytes, packed=done.packed, kept=done.kept)


def _write_config(
    stage: Path,
    source: Path,
    adapter: Path,
    document: Mapping[str, Any],
    dtype: str | None,
    shape: Shape,
    merged: Sequence[str],
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
    config[marks.MARK] = marks.added(config, merged)
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    shards.write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = source / "generation_config.json"
    if generation.is_file():
        shards.write_text(stage / generation.name, generation.read_text())
    if shape.reason:
        return  # the processor lies beside the head
    hand_on(adapter, document, stage)
