"""An adapter folder as one ONNX graph: merged, exported, and compared with the model that it was made of.

For models that answer in one pass: classifiers, taggers, readers of answers, of texts and of pictures. The graph takes
batches and lengths of any size; a head that reads elsewhere is a part of it. In float32, or with weights in 8 bits.
"""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from adapters import disk, interrupts, progress, shards
from adapters.agreement import Agreement, compared
from adapters.contracts import Adapted
from adapters.errors import FolderError, NumbersError, RequestError, message
from adapters.facts import hand_on
from adapters.int8 import quantised
from adapters.manifest import fetch, read_manifest
from adapters.places import refuse_taken
from adapters.predict import over_batches, prepared_rows, whole
from adapters.readers import REFUSED, ExportOptions, ExportReport, Finding, refuse, sizes
from adapters.sessions import GRAPH, PACKAGES, Session, medians, need_packages
from adapters.tracing import INSTEAD, OUTPUTS, TRIED, answers, made_up, opened, seen, traced

if TYPE_CHECKING:
    from datasets import Dataset

FACTS: Final = "export.json"  # what the graph was made of, and what was checked
BOUND: Final = 1e-3  # how far float32 logits may lie apart, as a share of their spread
LEAST: Final = 1e-4  # and absolute, where the spread is small
AGREEMENT: Final = 0.99  # share of rows whose answer has to be the same
WHOLE: Final = 1_800_000_000  # bytes of weights from which they lie in a file of their own; protobuf ends at 2^31


def export_onnx(folder: Path, out: Path, options: ExportOptions) -> ExportReport:
    """Write a graph in float32 that answers as the adapted model does.

    Args:
        folder: an adapter folder.
        out: the folder to write: model.onnx, the processor's files, config.json with the labels, export.json.
        options: `base`; `rows` to compare on, with labels where accuracy is to be told.

    Returns:
        The report. Its facts: inputs, outputs, opset, versions, rows, latency in milliseconds by number of rows,
        metrics, all of torch and of the graph.

    Raises:
        RequestError: a task whose models generate, an encoder-decoder, a model that torch cannot export.
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
        NumbersError: the graph does not answer as the model does; nothing is written.
        FolderError: an output that holds something else.
        DiskError: the disk is full or fails.
    """
    return _exported(folder, out, options, "onnx")


def export_int8(folder: Path, out: Path, options: ExportOptions) -> ExportReport:
    """Write the same graph with weights in 8 bits, for the CPU.

    8 bits change answers; how many can only be told on rows of the kind that the adapter is for, so rows are needed.

    Args:
        folder, out: as for `export_onnx`.
        options: `rows`, and `accept` to do without them, or to go on where fewer than 99 % of their answers are the
            same.

    Raises:
        NumbersError: too many answers changed; nothing is written.
        RequestError, MissingPackageError, FolderError, DiskError: as there, and where there are no rows.
    """
    if not options.rows and not options.accept:
        raise RequestError(
            message(
                "8 bits change answers, and there are no rows to see how many",
                where="target int8",
                remedy="Give rows of the adapter's kind (--data FILE), with labels to see the accuracy; "
                "or accept it unseen (--accept).",
            )
        )
    return _exported(folder, out, options, "int8")


def _exported(folder: Path, out: Path, options: ExportOptions, target: str) -> ExportReport:
    need_packages()
    adapter, out = fetch(folder), Path(out).expanduser()
    document = read_manifest(adapter)
    _refuse(document, target, options)
    refuse_taken(out, lambda names: _ours(out, names), "a new or empty folder, or an earlier export to ONNX")
    with interrupts.leaving(disk.outcome(out)), disk.staged(out) as stage:
        adapted, own = opened(adapter, document, options.base)
        labelled = bool(options.rows) and _labelled(options.rows)
        rows = prepared_rows(adapted, whole(adapted.task, options.rows), labelled=labelled) if options.rows else None
        batches = [made_up(adapted, *shape) for shape in TRIED]
        wanted = own if own is not None else answers(adapted.model, batches, document)
        external = sum(4 * tensor.numel() for tensor in adapted.model.parameters()) > WHOLE
        with progress.Job("exporting to ONNX"):
            opset = traced(adapted, document, stage / GRAPH, external=external)
        unrounded = _weights(stage)
        graph = Session(stage / GRAPH)
        tried = _compared(wanted, answers(graph, batches, document), document)
        _refuse_apart(tried, f"{out}, made-up inputs")
        if target == "int8":
            graph = _shrunk(stage, external)
            tried = _compared(wanted, answers(graph, batches, document), document)
        metrics: dict[str, dict[str, float]] = {}
        if rows is not None:
            tried, metrics = on_rows(adapted, graph, document, rows, target, labelled=labelled)
            _judged(tried, f"{out}, {len(rows)} rows", target, options)
        facts = {
            "inputs": list(graph.inputs),
            "outputs": list(graph.outputs),
            "opset": opset,
            "rows": len(rows) if rows is not None else 0,
            "answers": tried.answers,
            "bytes_of_weights": {"float32": unrounded, target if target == "int8" else "float32": _weights(stage)},
            "versions": {name: version(name) for name in ("torch", "transformers", *PACKAGES)},
        }
        _write(stage, adapter, document, adapted.model, {**facts, **tried.to_json(), "target": target})
        one, many = made_up(adapted, 1, 16), made_up(adapted, 32, 64)
        timed = {_shape(batch): _timed(adapted, graph, batch, target) for batch in (one, many)}
        return ExportReport(
            target=target,
            output=str(out),
            files=sizes(stage),
            max_difference=tried.max_difference,
            mean_difference=tried.mean_difference,
            agreement=tried.agreement,
            spread=tried.spread,
            compared=True,
            next=f"onnxruntime.InferenceSession({(out / GRAPH).as_posix()!r})",
            facts={**facts, "milliseconds": timed, "metrics": metrics},
        )


# ---------------------------------------------------------------------- what is refused


def findings(folder: Path) -> list[Finding]:
    """What no graph can hold of an adapter; reads its manifest alone."""
    return _findings(read_manifest(folder))


def _findings(document: Mapping[str, Any]) -> list[Finding]:
    task = document["task"]["name"]
    if task in OUTPUTS:
        return []
    what = "a model that answers token by token, or fills in what is hidden"
    why = f"one pass of a graph is no answer; it holds {', '.join(OUTPUTS)}"
    return [Finding(what, f"task {task!r}", REFUSED, why, INSTEAD)]


def _refuse(document: Mapping[str, Any], target: str, options: ExportOptions) -> None:
    """Only models that answer in one pass are one graph; what other targets are asked for means nothing here."""
    refuse(_findings(document), target)
    if options.dtype not in (None, "float32") or options.rank is not None:
        raise RequestError(
            message(
                "a graph is written in float32, or with the target int8, and has no rank",
                where="dtype, rank",
                found=f"{options.dtype}, {options.rank}",
                remedy="Leave them out.",
            )
        )


def _ours(out: Path, names: Sequence[str]) -> bool:
    """Whether a folder is an earlier export, which may be replaced."""
    if FACTS not in names or GRAPH not in names:
        return False
    with contextlib.suppress(FolderError):
        found: Any = shards.read_json(out / FACTS, 1 << 20)
        return isinstance(found, dict) and found.get("digest") == shards.digest_of(found)
    return False


def _refuse_apart(found: Agreement, where: str) -> None:
    """A graph in float32 differs from its model by rounding alone."""
    bound = max(BOUND * found.spread, LEAST)
    if not (found.max_difference <= bound and found.agreement >= AGREEMENT):  # so that a NaN is refused too
        raise NumbersError(
            message(
                "the exported graph does not answer as the adapted model does",
                where=where,
                expected=f"logits within {bound:.1e}, {AGREEMENT:.0%} of the answers the same",
                found=f"{found.max_difference:.1e} apart, {found.agreement:.1%} the same",
                remedy=f"Nothing was written. {INSTEAD}",
            )
        )


def _judged(found: Agreement, where: str, target: str, options: ExportOptions) -> None:
    if target != "int8":
        _refuse_apart(found, where)
    elif not found.agreement >= AGREEMENT and not options.accept:
        raise NumbersError(
            message(
                "8 bits change too many answers",
                where=where,
                expected=f"{AGREEMENT:.0%} of the answers the same",
                found=f"{found.agreement:.1%} of {found.answers}, logits up to {found.max_difference:.2g} apart",
                remedy="Nothing was written. Export in float32 (--to onnx), or take it as it is (--accept).",
            )
        )


def _shrunk(stage: Path, external: bool) -> Session:
    """The graph of a folder in 8 bits, in its place."""
    with progress.Job("rounding to 8 bits"), tempfile.TemporaryDirectory(dir=stage) as place:
        old = Path(place)
        for file in stage.glob(f"{GRAPH}*"):
            file.rename(old / file.name)
        quantised(old / GRAPH, stage / GRAPH, external=external)
    return Session(stage / GRAPH)


def _weights(stage: Path) -> int:
    """Bytes of the graph and its weights."""
    return sum(file.stat().st_size for file in stage.glob(f"{GRAPH}*"))


# ---------------------------------------------------------------------- answers


def _compared(wanted: Sequence[Tensor], found: Sequence[Tensor], document: Mapping[str, Any]) -> Agreement:
    options = document["task"]["options"]
    return compared(wanted, found, options.get("problem", "single-label"), options.get("threshold", 0.5))


def on_rows(
    adapted: Adapted, graph: Session, document: Mapping[str, Any], rows: Dataset, target: str, *, labelled: bool
) -> tuple[Agreement, dict[str, dict[str, float]]]:
    """How far model and graph agree on prepared rows, and the metrics of both where these have labels."""
    task, model, processor = adapted.task, adapted.model, adapted.processor
    wanted: list[Tensor] = []
    found: list[Tensor] = []

    def act(batch: dict[str, Any]) -> tuple[Tensor, ...]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        own, theirs = model(**inputs), graph(**inputs)
        wanted.extend(seen(own, inputs, document))
        found.extend(seen(theirs, inputs, document))
        if not labelled:
            return (torch.zeros(len(next(iter(inputs.values())))),)
        return (*task.measured(own, batch, model, processor), *task.measured(theirs, batch, model, processor))

    measured = over_batches("comparing answers", adapted, rows, act)
    metrics: dict[str, dict[str, float]] = {}
    if labelled:
        half = len(measured) // 2
        for name, part in (("torch", measured[:half]), (target, measured[half:])):
            metrics[name] = task.metrics(part, rows, processor)
    return _compared(wanted, found, document), metrics


def _labelled(rows: Any) -> bool:
    """Whether rows hold what is to be answered."""
    columns = rows.column_names if hasattr(rows, "column_names") else rows[0] if isinstance(rows[0], Mapping) else ()
    return bool({"label", "tags", "answers", "answer"} & set(columns))


def _shape(batch: Mapping[str, Any]) -> str:
    """How a batch is called: by its rows, and their tokens."""
    count, *places = next(iter(batch.values())).shape
    text = "1 row" if count == 1 else f"{count} rows"
    return f"{text} of {places[0]} tokens" if len(places) == 1 else text


def _timed(adapted: Adapted, graph: Session, batch: Mapping[str, Any], target: str) -> dict[str, float]:
    with progress.Job("timing"):
        return medians({"torch": adapted.model, target: graph}, batch)


# ---------------------------------------------------------------------- the folder


def _write(stage: Path, adapter: Path, document: Mapping[str, Any], model: Any, facts: Mapping[str, Any]) -> None:
    """What lies beside the graph: the processor, the labels, and what the graph was made of; all flushed."""
    for file in stage.iterdir():
        with file.open("rb+") as stream:
            shards.flush(stream)
    backbone = document["backbone"]
    hand_on(adapter, document, stage)
    config = {**copy.deepcopy(model.config.to_dict()), "architectures": [backbone["model_class"]]}
    shards.write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    made: dict[str, Any] = {
        "format": 1,
        "task": document["task"],
        "adapter": document["digest"],
        "backbone": {"name": backbone["name"], "fingerprint": backbone["fingerprint"]["digest"]},
        **facts,
        "files": {
            file.relative_to(stage).as_posix(): {"size": file.stat().st_size, "sha256": shards.sha256(file)}
            for file in sorted(stage.rglob("*"))
            if file.is_file()
        },
    }
    made["digest"] = shards.digest_of(made)
    shards.write_text(stage / FACTS, json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
