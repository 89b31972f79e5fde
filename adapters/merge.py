"""A plain transformers model again: edits applied in memory, or streamed from disk to disk.

The stream reads, edits and writes a few rows at a time, in several threads, whatever the size of the model, checks the
backbone's fingerprint as it passes, and reads back what it wrote. It imports torch, but neither peft (unless the
strategy's own merge needs it) nor a model.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from adapters import disk, parts, shards
from adapters.backbones import MAX_CONFIG, check_folder
from adapters.contracts import Adapted
from adapters.errors import AdaptersError, FolderError, NumbersError, RequestError, message
from adapters.manifest import fetch, read_manifest, read_tensors
from adapters.rewrite import rewrite, single_threaded
from adapters.storage import strategy_of, task_of
from adapters.stream import plan
from adapters.vocabulary import all_edits, of_manifest

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from adapters.edits import Edit

# How far merged logits may lie from adapted ones, as a share of the logits' spread, by the coarsest dtype at work.
BOUNDS = {"float32": 1e-4, "float64": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
ROWS = 8  # rows of the logits check
# Fields of the backbone's config that classes of answers, padding and added tokens set.
CONFIG_FIELDS = {"num_labels", "id2label", "label2id", "problem_type", "pad_token_id", "vocab_size"}
MARK = "merged_adapters"  # config field that names what has been merged into a checkpoint


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

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


# ---------------------------------------------------------------------- in memory


def merge(adapted: Adapted) -> PreTrainedModel:
    """Put what was trained into the live model, take the adapters out, and return it: plain transformers again.

    `adapted` is spent afterwards.

    Raises:
        RequestError: packed storage, into which a merge is lossy.
        SpentError: merged already.
    """
    import torch

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
    edits = all_edits(adapted.vocabulary, adapted.strategy, state)
    model = adapted.model
    adapted.strategy.strip(model)
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
    _refuse_output(target)
    _refuse_config(document, where)
    with single_threaded():
        edits = _edits(document, read_tensors(adapter, document), where)
    source = _base_folder(document, base, where)
    check_folder(source)
    edits = parts.on_disk(edits, document, source)
    steps = plan(document, edits, shards.read_directory(source), dtype, str(source))
    with disk.staged(target) as stage, single_threaded() as threads:
        verified = rewrite(stage, steps, source, document, threads)
        _write_config(stage, source, adapter, document, dtype)
        edited = [step for step in steps if step.edit is not None]
        report = MergeReport(
            output=str(target),
            tensors=len(steps),
            edited=len(edited),
            created=sum(step.source is None for step in edited),
            bytes=sum(step.nbytes for step in steps),
            dtype=edited[0].dtype if edited else steps[0].dtype,
            verified=verified,
        )
        return _with_fidelity(report, stage, adapter, source, document, rows) if check_logits else report


def _edits(document: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> dict[str, Edit]:
    """What the adapter does to its backbone's tensors.

    Raises:
        FolderError: options that its tensors do not bear out.
    """
    try:
        return all_edits(of_manifest(document, where), strategy_of(document, where), tensors)
    except AdaptersError:
        raise
    except (LookupError, ValueError, TypeError, AttributeError, RuntimeError, MemoryError) as fault:
        raise FolderError(
            message(
                "the adapter's tensors are not those of its strategy",
                where=where,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:200],
            )
        ) from fault


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


def _refuse_output(target: Path) -> None:
    content = sorted(entry.name for entry in target.iterdir()) if target.is_dir() else []
    ours = False
    if "config.json" in content:
        with contextlib.suppress(FolderError):
            ours = MARK in shards.read_json(target / "config.json", MAX_CONFIG)
    if target.is_symlink() or (target.exists() and not target.is_dir()) or (content and not ours):
        raise FolderError(
            message(
                "the output folder already holds something else",
                where=str(target),
                expected="a new or empty folder, or an earlier merge",
                found=", ".join(content[:5]) or "not a folder",
                remedy="Give another output.",
            )
        )


def _base_folder(document: Mapping[str, Any], base: str | Path | None, where: str) -> Path:
    from adapters.backbones import local_folder
    from adapters.manifest import refuse_gone
    from adapters.places import is_path

    name = str(base) if base is not None else document["backbone"]["name"]
    revision = document["backbone"]["revision"]
    if not name:
        raise RequestError(
            message("the adapter was made on a live model without a name", where=where, remedy="Give base=folder.")
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    place = isinstance(base, Path) or is_path(name) or (base is not None and "/" not in name)
    cached = None if place else local_folder(name, {} if base is not None else {"revision": revision})
    if cached is not None:
        return cached
    if place or base is not None:
        raise RequestError(message("there is no such backbone folder", where=name, remedy="Give base=folder."))
    refuse_gone(document, where)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision or None))
    except Exception as fault:  # the hub client raises a family of its own, and whatever the network raises
        raise RequestError(
            message(
                "the backbone is neither here nor to be had from the hub",
                where=name,
                found=" ".join(str(fault).split())[:200],
                remedy="Give base=folder.",
            )
        ) from fault


def _write_config(stage: Path, source: Path, adapter: Path, document: Mapping[str, Any], dtype: str | None) -> None:
    """config.json with the task's labels, the source's generation config, the adapter's processor files."""
    backbone = document["backbone"]
    config = shards.read_json(source / "config.json", MAX_CONFIG)
    config |= {key: value for key, value in backbone["config"].items() if key != "num_labels"}
    if "num_labels" in backbone["config"] and "id2label" not in backbone["config"]:
        count = backbone["config"]["num_labels"]
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(count)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(count)}
    config["architectures"] = [backbone["model_class"]]
    config[MARK] = [*config.get(MARK, []), document["digest"]]
    if dtype is not None:
        config["dtype"] = dtype
        config.pop("torch_dtype", None)
    shards.write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    generation = source / "generation_config.json"
    if generation.is_file():
        shards.write_text(stage / generation.name, generation.read_text())
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
    free = _free_memory()
    need = 3 * max(document["backbone"]["bytes"], report.bytes)
    if free is not None and need > free:
        return _replaced(report, skipped=f"the logits check needs about {need:,} bytes of memory, {free:,} are free")
    request = {"adapter": str(adapter), "merged": str(stage), "base": str(source), "rows": rows}
    root = str(Path(__file__).resolve().parents[1])
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


def _free_memory() -> int | None:
    """Bytes that a new process can have, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
