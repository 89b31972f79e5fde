"""A plain transformers model again: edits applied in memory, or streamed from disk to disk.

The stream reads, edits and writes a few rows at a time, in several threads, whatever the size of the model, checks the
backbone's fingerprint as it passes, and reads back what it wrote. It imports torch, but neither peft (unless the
strategy's own merge needs it) nor a model.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import disk, interrupts, marks, parts, places, progress, shards, standalone
from adapters.backbones import MAX_CONFIG, check_folder
from adapters.changes import base_folder, streamed_edits
from adapters.contracts import Adapted
from adapters.errors import AdaptersError, FolderError, NumbersError, RequestError, message
from adapters.manifest import fetch, is_standalone, read_manifest, refuse_changed
from adapters.memory import free_memory
from adapters.rewrite import rewrite, single_threaded
from adapters.shortening import changed
from adapters.storage import task_of
from adapters.stream import plan
from adapters.vocabulary import all_edits

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.stream import Step

logger = logging.getLogger(__name__)

# How far merged logits may lie from adapted ones, as a share of the logits' spread, by the coarsest dtype at work.
BOUNDS = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
ROWS = 8  # rows of the logits check
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
                "adapters.merge_on_disk(folder, output).",
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
) -> MergeReport:
    """Write a plain transformers folder: the backbone with the adapter's edits in it.

    Args:
        folder: an adapter folder.
        out: the folder to write; must be new, empty, or a merge of ours.
        base: the backbone's folder, where it is not the one that the adapter names.
        dtype: of the written tensors, e.g. "bfloat16"; None keeps each tensor's own.
        rows: raw rows of the task (or texts) for the logits check; None makes synthetic ones.
        check_logits: compare the logits of the merged and the adapted model in a child process.

    Returns:
        The report; its differences lie within the stated bound.

    Raises:
        BackboneError: the base is not the adapter's backbone; nothing is left behind.
        FolderError: a damaged folder, or an output that holds something else.
        NumbersError: the written model does not answer as the adapted one does.
    """
    _refuse_rows(rows)
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
    steps = plan(document, edits, shards.read_directory(source), dtype, str(source), shape.left_out)
    with interrupts.leaving(disk.outcome(target)), disk.staged(target) as stage, single_threaded() as threads:
        place, steps, head = (stage, steps, {}) if not shape.reason else _divided(stage, steps, document)
        verified = rewrite(place, steps, source, document, threads)
        if in_file:
            refuse_changed(adapter, document)
        _write_config(place, source, adapter, document, dtype, shape)
        if shape.reason:
            facts = standalone.described(place, steps, head, document["backbone"]["fingerprint"]["prefix"], shape.task)
            standalone.write(stage, adapter, document, facts)
        edited = [step for step in steps if step.edit is not None]
        report = MergeReport(
            output=str(target),
            tensors=len(steps),
            edited=len(edited),
            created=sum(step.source is None for step in edited),
            bytes=sum(step.nbytes for step in steps),
            dtype=edited[0].dtype if edited else steps[0].dtype,
            verified=verified,
            form="standalone" if shape.reason else "plain",
            reason=shape.reason,
            left_out=len(shape.left_out),
        )
        return _with_fidelity(report, stage, adapter, source, document, rows) if check_logits else report


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


# ---------------------------------------------------------------------- fidelity


def _with_fidelity(
    report: MergeReport, stage: Path, adapter: Path, source: Path, document: Mapping[str, Any], rows: list[Any] | None
) -> MergeReport:
    """Compare logits of the merged and the adapted model in a child process, where both fit into memory."""
    free = free_memory()
    need = 3 * max(document["backbone"]["bytes"], report.bytes)
    if need > free:
        return _replaced(report, skipped=f"the logits check needs about {need:,} bytes of memory, {free:,} are free")
    request = {"adapter": str(adapter), "merged": str(stage), "base": str(source), "rows": rows}
    root = str(Path(__file__).resolve().parents[1])
    with progress.Job("comparing logits"):
        child = subprocess.run(
            [sys.executable, "-c", "import sys, adapters.fidelity as f; f.main(sys.stdin.read())"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        )
    if child.returncode != 0:
        raise AdaptersError(
            message("the logits check broke", where=report.output, found=" ".join(child.stderr.split())[-500:])
        )
    found = json.loads(child.stdout.strip().splitlines()[-1])
    coarsest = min((report.dtype, found.pop("dtype")), key=lambda name: -BOUNDS.get(name, 1.0))
    bound = BOUNDS[coarsest] * max(found["spread"], 1e-6)
    if not found["max_difference"] <= bound:  # so that a NaN is refused too
        raise NumbersError(
            message(
                "the merged model does not answer as the adapted one does",
                where=f"{report.output}, {ROWS} rows",
                expected=f"logits within {bound:.2e} ({BOUNDS[coarsest]} of their spread, {coarsest})",
                found=f"{found['max_difference']:.2e} apart",
                remedy="Nothing was written. Merge with dtype='float32'.",
            )
        )
    return _replaced(report, logits_checked=True, **found)


def _replaced(report: MergeReport, **changes: Any) -> MergeReport:
    return MergeReport(**{**asdict(report), **changes})
