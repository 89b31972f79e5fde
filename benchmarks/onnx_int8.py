"""An adapter in torch, as a graph in float32, and as one in 8 bits: bytes, time, accuracy, answers that are the same.

    python -m benchmarks.onnx_int8            sst2 on MiniLM; a tagger and a ViT, small ones that are made here
    python -m benchmarks.onnx_int8 --smoke    a few rows

One thread each, turns taken one after the other, medians. Beside our 8 bits stand those of ONNX Runtime's
`quantize_dynamic`, the usual way there, over the same graph.
"""

from __future__ import annotations

import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import made, parts
from benchmarks.harness import say

SMOKE = "--smoke" in sys.argv
TAGS = ("O", "B-PER", "I-PER", "B-LOC")


@dataclass(frozen=True)
class Case:
    """An adapter and rows with labels."""

    name: str
    folder: Path
    rows: list[dict[str, Any]]
    metric: str


def sst2() -> Case:
    """The adapter that the other benchmarks of parts use."""
    _, test = parts.rows("sst2")
    return Case("sst2, MiniLM", parts.trained("sst2"), test[: 64 if SMOKE else None], "accuracy")


def tagger(place: Path) -> Case:
    """Names by their capital letter, on MiniLM: 200 invented sentences, 2 epochs."""
    import random

    import adapters

    draw = random.Random(0)
    rows = []
    for _ in range(80 if SMOKE else 400):
        words, tags = ["the"], ["O"]
        for _ in range(draw.randrange(3, 9)):
            kind = draw.choice(TAGS)
            kind = "B-PER" if kind == "I-PER" and tags[-1] not in ("B-PER", "I-PER") else kind
            words.append({"O": draw.choice(made.THINGS), "B-LOC": draw.choice(("Rome", "Paris", "Oslo"))}.get(kind, ""))
            words[-1] = words[-1] or draw.choice(("Anna", "Peter", "Maria", "John"))
            tags.append(kind)
        rows.append({"tokens": words, "tags": tags})
    half = len(rows) // 2
    adapted = adapters.adapt(parts.backbone("sst2"), "lora", task="token-classification", labels=list(TAGS))
    settings = {**parts.STEP, "output_dir": str(place / "run"), "num_train_epochs": 1 if SMOKE else 2}
    adapters.Trainer(adapted, settings, rows[:half]).train()
    return Case("tagger, MiniLM", adapters.save(adapted, place / "tagger"), rows[half:], "f1")


def vit(place: Path) -> Case:
    """Pictures of noise over three colours, on a ViT of 4 blocks, 128 wide, with random weights; a solved probe."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    import adapters

    torch.manual_seed(made.SEED)
    shape = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.ViTConfig(image_size=64, patch_size=8, initializer_range=0.05, **shape)
    transformers.ViTModel(config).save_pretrained(place / "vit")
    transformers.ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(place / "vit")
    draw = np.random.default_rng(0)
    rows = []
    for number in range(60 if SMOKE else 400):
        pixels = draw.integers(0, 160, (64, 64, 3)) + np.eye(3, dtype=int)[number % 3] * 12
        rows.append({"image": Image.fromarray(pixels.astype("uint8")), "label": "rgb"[number % 3]})
    half = len(rows) // 2
    adapted = adapters.adapt(str(place / "vit"), "probe", task="image-classification", labels=list("rgb"))
    adapters.Trainer(adapted, {**parts.STEP, "output_dir": str(place / "vit-run")}, rows[:half]).train()
    return Case("pictures, ViT", adapters.save(adapted, place / "vit-adapter"), rows[half:], "accuracy")


def measured(case: Case, place: Path) -> list[list[str]]:
    """The lines of a table: torch, the graph, the graph in 8 bits, and in ONNX Runtime's own 8 bits."""
    import adapters
    from adapters import onnxfile, sessions, tracing
    from adapters.manifest import read_manifest
    from adapters.predict import prepared_rows, whole

    reports = {
        target: adapters.export(case.folder, place / target, to=target, rows=case.rows, accept=True)
        for target in ("onnx", "int8")
    }
    document = read_manifest(case.folder)
    adapted, _ = tracing.opened(case.folder, document, None)
    models: dict[str, Any] = {"torch": adapted.model.eval()}
    models |= {name: sessions.Session(place / name / sessions.GRAPH) for name in reports}
    _theirs(place / "onnx" / sessions.GRAPH, place / "theirs.onnx")
    models["quantize_dynamic"] = sessions.Session(place / "theirs.onnx")
    rows = prepared_rows(adapted, whole(adapted.task, case.rows), labelled=True)
    theirs, metrics = onnxfile.on_rows(adapted, models["quantize_dynamic"], document, rows, "theirs", labelled=True)
    bytes_of = {
        "torch": sum(tensor.numel() * 4 for tensor in adapted.model.parameters()),
        **{
            name: report.facts["bytes_of_weights"]["float32" if name == "onnx" else name]
            for name, report in reports.items()
        },
        "quantize_dynamic": (place / "theirs.onnx").stat().st_size,
    }
    scores = {
        "torch": reports["onnx"].facts["metrics"]["torch"],
        **{name: report.facts["metrics"][name] for name, report in reports.items()},
        "quantize_dynamic": metrics["theirs"],
    }
    same: Mapping[str, Any] = {name: report.agreement for name, report in reports.items()} | {
        "quantize_dynamic": theirs.agreement
    }
    times = []
    for count in (1, 32):
        features = [rows[index] for index in range(min(count, len(rows)))]
        batch = dict(adapted.task.collate(features, adapted.model, adapted.processor))
        times.append(sessions.medians(models, {n: v for n, v in batch.items() if n not in ("row", "labels")}))
    return [
        [
            case.name,
            name,
            f"{bytes_of[name] / 1e6:.1f}",
            *(f"{part[name]:.1f}" for part in times),
            f"{100 * scores[name][case.metric]:.1f}",
            f"{100 * same[name]:.2f}" if name in same else "",
        ]
        for name in models
    ]


def _theirs(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    root.disabled = True  # it advises to optimise first, which the exporter has done
    kinds = ["MatMul", "Gemm", "Gather"]
    quantize_dynamic(source, target, op_types_to_quantize=kinds, per_channel=True, weight_type=QuantType.QInt8)
    root.disabled = False


def main() -> None:
    """Print the table."""
    place = Path(tempfile.mkdtemp(prefix="holdfast-onnx-"))
    print("| rows | computed by | MB | 1 row, ms | 32 rows, ms | accuracy or F1, % | same answers, % |")
    print("|---|---|---|---|---|---|---|")
    try:
        for make in (sst2, lambda: tagger(place), lambda: vit(place)):
            case = make()
            say(f"exporting {case.name}")
            for line in measured(case, place / "exported" / case.name.split(",")[0]):
                print(f"| {' | '.join(line)} |", flush=True)
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
