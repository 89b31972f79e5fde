"""An adapter folder as one ONNX graph: merged, exported, and compared with the model that it was made of.

For models that answer in one pass: classifiers, taggers, readers of answers, of texts and of pictures. The graph takes
batches and lengths of any size; a head that reads elsewhere is a part of it. In float32, or with weights in 8 bits.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from adapters import disk, interrupts, pooling, progress, shards
from adapters.agreement import Agreement, compared
from adapters.contracts import Adapted
from adapters.errors import FolderError, NumbersError, RequestError, message
from adapters.int8 import quantised
from adapters.manifest import WEIGHTS, fetch, is_standalone, read_manifest
from adapters.merge import merge, merge_on_disk
from adapters.pixels import noise
from adapters.places import refuse_taken
from adapters.predict import over_rows, prepared_rows, whole
from adapters.readers import ExportOptions, ExportReport, sizes
from adapters.sessions import GRAPH, PACKAGES, Session, medians, need_packages
from adapters.storage import load
from adapters.tokens import limit_of

OUTPUTS: Final = {  # of the tasks whose models answer in one pass
    "text-classification": ("logits",),
    "token-classification": ("logits",),
    "image-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
}
INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
FACTS: Final = "export.json"  # what the graph was made of, and what was checked
MADE_UP: Final = ((1, 5), (3, 24), (17, 64))  # rows and tokens of the batches on which every graph is tried
TRACED: Final = (2, 11)  # rows and tokens of the batch that it is traced with
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
                remedy="Give rows of the adapter's kind (--rows FILE), with labels to see the accuracy; "
                "or accept it unseen (--accept).",
            )
        )
    return _exported(folder, out, options, "int8")


def _exported(folder: Path, out: Path, options: ExportOptions, target: str) -> ExportReport:
    need_packages()
    adapter, out = fetch(folder), Path(out).expanduser()
    document = read_manifest(adapter)
    _refuse_task(document, str(adapter))
    refuse_taken(out, lambda names: _ours(out, names), "a new or empty folder, or an earlier export to ONNX")
    with interrupts.leaving(disk.outcome(out)), disk.staged(out) as stage:
        adapted, own = _opened(adapter, document, options.base)
        batches = [_made_up(adapted, *shape) for shape in MADE_UP]
        wanted = own if own is not None else _answers(adapted.model, batches, document)
        external = sum(4 * tensor.numel() for tensor in adapted.model.parameters()) > WHOLE
        with progress.Job("exporting to ONNX"):
            opset = _traced(adapted, document, stage / GRAPH, external=external)
        unrounded = _weights(stage)
        graph = Session(stage / GRAPH)
        tried = _compared(wanted, _answers(graph, batches, document), document)
        _refuse_apart(tried, str(out), "batches of made-up inputs")
        if target == "int8":
            graph = _shrunk(stage, external)
            tried = _compared(wanted, _answers(graph, batches, document), document)
        found, metrics, rows = _on_rows(adapted, graph, document, options.rows, target)
        told = found or tried
        if found is not None:
            _judged(found, str(out), target, rows, options)
        facts = {
            "inputs": list(graph.inputs),
            "outputs": list(graph.outputs),
            "opset": opset,
            "rows": rows,
            "answers": told.answers,
            "bytes_of_weights": {"float32": unrounded, target if target == "int8" else "float32": _weights(stage)},
            "versions": {name: version(name) for name in ("torch", "transformers", *PACKAGES)},
        }
        _write(stage, adapter, document, adapted.model, {**facts, **told.to_json(), "target": target})
        one, many = _made_up(adapted, 1, 16), _made_up(adapted, 32, 64)
        timed = {
            f"{len(next(iter(batch.values())))} rows": _timed(adapted, graph, batch, target) for batch in (one, many)
        }
        return ExportReport(
            target=target,
            output=str(out),
            files=sizes(stage),
            max_difference=told.max_difference,
            mean_difference=told.mean_difference,
            agreement=told.agreement,
            spread=told.spread,
            compared=True,
            next=f"onnxruntime.InferenceSession({(out / GRAPH).as_posix()!r})",
            facts={**facts, "milliseconds": timed, "metrics": metrics},
        )


# ---------------------------------------------------------------------- what is refused


def _refuse_task(document: Mapping[str, Any], where: str) -> None:
    """Only models that answer in one pass are one graph."""
    task = document["task"]["name"]
    if task not in OUTPUTS:
        raise RequestError(
            message(
                "a model that is no single graph: it answers token by token, or fills in what is hidden",
                where=f"{where}, task {task!r}",
                expected=", ".join(OUTPUTS),
                remedy="Deploy the transformers folder: adapters merge.",
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


def _refuse_apart(found: Agreement, where: str, on: str) -> None:
    """A graph in float32 differs from its model by rounding alone."""
    bound = max(BOUND * found.spread, LEAST)
    if not (found.max_difference <= bound and found.agreement >= AGREEMENT):  # so that a NaN is refused too
        raise NumbersError(
            message(
                "the exported graph does not answer as the adapted model does",
                where=f"{where}, {on}",
                expected=f"logits within {bound:.1e}, {AGREEMENT:.0%} of the answers the same",
                found=f"{found.max_difference:.1e} apart, {found.agreement:.1%} the same",
                remedy="Nothing was written. Deploy the transformers folder: adapters merge.",
            )
        )


def _judged(found: Agreement, where: str, target: str, rows: int, options: ExportOptions) -> None:
    if target != "int8":
        _refuse_apart(found, where, f"{rows} rows")
    elif not found.agreement >= AGREEMENT and not options.accept:
        raise NumbersError(
            message(
                "8 bits change too many answers",
                where=f"{where}, {rows} rows",
                expected=f"{AGREEMENT:.0%} of the answers the same",
                found=f"{found.agreement:.1%} of {found.answers}, logits up to {found.max_difference:.2g} apart",
                remedy="Nothing was written. Export in float32 (--to onnx), or take it as it is (--accept).",
            )
        )


# ---------------------------------------------------------------------- the model


def _opened(adapter: Path, document: Mapping[str, Any], base: str | Path | None) -> tuple[Adapted, list[Tensor] | None]:
    """The merged model in float32, its head where it reads; and the adapted one's outputs on made-up inputs.

    An adapter over 4 bits is merged on disk, where its answers are compared; then there are none.
    """
    adapted = load(adapter, base)
    if adapted.model.config.is_encoder_decoder:
        raise RequestError(
            message(
                "an encoder-decoder is no single graph",
                where=type(adapted.model).__name__,
                expected="an encoder, or a decoder with a head",
                remedy="Deploy the transformers folder: adapters merge.",
            )
        )
    own = None
    if adapted.storage.quantization is None:
        adapted.model.float()
        own = _answers(adapted.model, [_made_up(adapted, *shape) for shape in MADE_UP], document)
        read = pooling.placed(adapted.model)
        pooling.strip(adapted.model)  # a merge refuses what a saved model would forget; here nothing is saved
        pooling.place(merge(adapted), read.pooling, read.layer)
    else:
        adapted = dataclasses.replace(adapted, model=_unpacked(adapter, base, adapted))
    if "use_cache" in adapted.model.config.to_dict():
        adapted.model.config.use_cache = False
    return adapted, own


def _unpacked(adapter: Path, base: str | Path | None, adapted: Adapted) -> Any:
    import transformers

    with tempfile.TemporaryDirectory() as place:
        merged = Path(place) / "merged"
        merge_on_disk(adapter, merged, base=base, dtype="float32")
        if is_standalone(merged):
            return load(merged).model.float()
        auto: Any = getattr(transformers, adapted.task.auto_class)
        return auto.from_pretrained(merged, dtype=torch.float32, trust_remote_code=False).eval()


# ---------------------------------------------------------------------- inputs


def _names(adapted: Adapted) -> tuple[str, ...]:
    """The inputs that the processor gives and the model takes, in their order."""
    given = getattr(adapted.processor, "model_input_names", INPUTS[:2])
    pixels = adapted.model.main_input_name == "pixel_values"
    return tuple(name for name in INPUTS if name in given and (name == "pixel_values") == pixels)


def _made_up(adapted: Adapted, rows: int, length: int) -> dict[str, Any]:
    """Inputs at random, rows of several lengths, padded; of pictures noise, as the processor makes it."""
    if adapted.model.main_input_name == "pixel_values":
        prepared = prepared_rows(adapted, whole(adapted, noise(rows, adapted.model)), labelled=False)
        features = [prepared[index] for index in range(rows)]
        batch = adapted.task.collate(features, adapted.model, adapted.processor)
        return {name: value for name, value in batch.items() if name != "row"}
    config = adapted.model.config.get_text_config()
    length = min(length, limit_of(None, adapted.processor, adapted.model))
    generator = torch.Generator().manual_seed(rows)
    low, pad = min(8, config.vocab_size - 1), config.pad_token_id or 0
    ids = torch.randint(low, config.vocab_size, (rows, length), generator=generator)
    ids[ids == pad] = low if low != pad else low - 1
    mask = (torch.arange(length) < (length - torch.arange(rows) % 4)[:, None]).long()
    kinds = torch.arange(length).expand(rows, length) >= length // 2
    several = config.to_dict().get("type_vocab_size", 1) > 1
    made = {
        "input_ids": ids.masked_fill(mask == 0, pad),
        "attention_mask": mask,
        "token_type_ids": kinds.long() * mask if several else torch.zeros_like(ids),
    }
    return {name: made[name] for name in _names(adapted)}


# ---------------------------------------------------------------------- the graph


@final
class _Answering(nn.Module):
    """A model as a function of tensors in their order."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str], fixed: Mapping[str, Any]):
        super().__init__()
        self.model = model
        self.inputs, self.outputs, self.fixed = tuple(inputs), tuple(outputs), dict(fixed)

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The outputs, each by its place."""
        found = self.model(**dict(zip(self.inputs, values, strict=True)), **self.fixed)
        return tuple(found[name] for name in self.outputs)


def _traced(adapted: Adapted, document: Mapping[str, Any], file: Path, *, external: bool) -> int:
    """Write the graph of a model; returns its opset.

    Raises:
        RequestError: torch cannot export it.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    batch = _made_up(adapted, *TRACED)
    inputs = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    fixed = {name: value for name, value in batch.items() if name not in inputs}
    outputs = OUTPUTS[document["task"]["name"]]
    rows, places = torch.export.Dim("batch"), torch.export.Dim("sequence")
    axes = tuple({0: rows} if name == "pixel_values" else {0: rows, 1: places} for name in inputs)
    model = _Answering(adapted.model.eval(), tuple(inputs), outputs, fixed)
    try:
        with _hushed(), torch.no_grad():
            program = torch.onnx.export(
                model,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=(axes,),
                dynamo=True,
                verbose=False,
            )
    except Exception as fault:  # whatever the exporter, or the model's own code under it, could not do
        raise RequestError(
            message(
                "torch cannot export this model to ONNX",
                where=type(adapted.model).__name__,
                found=" ".join(f"{type(fault).__name__}: {fault}".split())[:300],
                remedy="Deploy the transformers folder: adapters merge.",
            )
        ) from fault
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)  # line by line, where on this machine the model's code lies
    program.save(file, external_data=external)
    opset: int = program.model.opset_imports[""]
    return opset


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter talks of packages that it would know, and of its own deprecated parts."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


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


def _answers(model: Any, batches: Sequence[Mapping[str, Any]], document: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of a model or a graph for each batch, without what stands at padding."""
    if isinstance(model, nn.Module):
        model.eval()
    found: list[Tensor] = []
    with torch.inference_mode():
        for batch in batches:
            found += _seen(model(**batch), batch, document)
    return found


def _seen(outputs: Any, batch: Mapping[str, Any], document: Mapping[str, Any]) -> list[Tensor]:
    """The outputs where there is a token; those at padding mean nothing."""
    names = OUTPUTS[document["task"]["name"]]
    logits = outputs[names[0]].float()
    if names != ("logits",):  # of places, among which the answer is
        rows = [outputs[name].float() for name in names]
        return [row[seen] for part in rows for row, seen in zip(part, batch["attention_mask"].bool(), strict=True)]
    return [logits[batch["attention_mask"].bool()] if logits.ndim == 3 else logits]


def _compared(wanted: Sequence[Tensor], found: Sequence[Tensor], document: Mapping[str, Any]) -> Agreement:
    options = document["task"]["options"]
    return compared(wanted, found, options.get("problem", "single-label"), options.get("threshold", 0.5))


def _on_rows(
    adapted: Adapted, graph: Session, document: Mapping[str, Any], rows: Sequence[Any] | None, target: str
) -> tuple[Agreement | None, dict[str, dict[str, float]], int]:
    """How far they agree on the same rows, the metrics of both where the rows have labels, how many rows."""
    if not rows:
        return None, {}, 0
    task, model, processor = adapted.task, adapted.model, adapted.processor
    labelled = _labelled(rows)
    prepared = prepared_rows(adapted, whole(adapted, rows), labelled=labelled)
    wanted: list[Tensor] = []
    found: list[Tensor] = []

    def act(batch: dict[str, Any]) -> tuple[Tensor, ...]:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        own, theirs = model(**inputs), graph(**inputs)
        wanted.extend(_seen(own, inputs, document))
        found.extend(_seen(theirs, inputs, document))
        if not labelled:
            return (torch.zeros(len(next(iter(inputs.values())))),)
        return (*task.measured(own, batch, model, processor), *task.measured(theirs, batch, model, processor))

    measured = over_rows("comparing answers", adapted, prepared, act)
    metrics: dict[str, dict[str, float]] = {}
    if labelled:
        half = len(measured) // 2
        metrics = {
            name: task.metrics(part, prepared, processor)
            for name, part in (("torch", measured[:half]), (target, measured[half:]))
        }
    return _compared(wanted, found, document), metrics, len(rows)


def _labelled(rows: Any) -> bool:
    """Whether rows hold what is to be answered."""
    columns = rows.column_names if hasattr(rows, "column_names") else rows[0] if isinstance(rows[0], Mapping) else ()
    return bool({"label", "tags", "answers", "answer"} & set(columns))


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
    for name in document["files"]:
        inside = backbone.get("inside") and name.startswith(f"{backbone['name']}/")
        if name not in (WEIGHTS, "adapter_config.json") and not inside:
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            shards.copy(adapter / name, stage / name)
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
