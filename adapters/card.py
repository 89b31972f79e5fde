"""The model card of an adapter folder: only what is known, nothing to be filled in later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters import journal, machine
from adapters.contracts import Adapted
from adapters.places import is_path

PARTS = {"test": "this adapter", "untrained": "before training", "majority": "without a look at the input"}
# Other metrics of the record, in a sentence.
TOLD = {
    "validation": "validation: {}, at its best, which chose the weights",
    "start": "The head as it was solved on frozen features before any step, on rows that were held back: {}",
}


def card(adapted: Adapted, manifest: Mapping[str, Any]) -> str:
    """The text of README.md: front matter for the hub, use, data, results beside baselines, limits, training."""
    from huggingface_hub import ModelCardData

    from adapters.anatomy import class_name

    backbone = adapted.record.backbone
    on_hub = bool(backbone) and not Path(backbone).expanduser().exists()
    data = ModelCardData(
        library_name="holdfast",
        base_model=backbone if on_hub else None,
        pipeline_tag=adapted.task.pipeline,
        tags=["adapters", adapted.strategy.name],
    )
    name = Path(backbone).name if backbone else class_name(adapted.model)
    sections = {
        "Use": _use(adapted, name),
        "Data": _data(adapted),
        "Results": _results(adapted),
        "Limits": _limits(adapted, name),
        "Training": _training(adapted, manifest),
    }
    lines = ["---", data.to_yaml(), "---", f"# {adapted.strategy.name} adapter for {name}", ""]
    for title, text in sections.items():
        lines += [f"## {title}", "", *text, ""]
    return "\n".join(lines)


def _use(adapted: Adapted, name: str) -> list[str]:
    return [
        f"Task: {adapted.task.describe()}.",
        "",
        f"The folder holds the trained tensors alone. They work on one backbone, {name}; loading makes sure that it is",
        "the one, tensor by tensor, and refuses another.",
        "",
        "```python",
        "import adapters",
        "",
        'adapted = adapters.load("this folder")',
        f"adapters.predict(adapted, {_example(adapted)})",
        "```",
        "",
        "`adapters merge` makes one plain transformers model of the two.",
    ]


def _data(adapted: Adapted) -> list[str]:
    record = adapted.record
    if not record.data:
        return ["It has not been trained, or its record does not say on what."]
    source = record.recipe.get("data", "")
    given = list(source.values()) if isinstance(source, Mapping) else [source] if source else []
    files = [file for part in given for file in (part if isinstance(part, list) else [part])]
    names = [Path(file).name if is_path(str(file)) else str(file) for file in files]
    rows = record.data.get("rows")
    told = f"{rows:,} training rows" if isinstance(rows, int) else "a stream of training rows"
    digest = record.data.get("sha256")
    return [
        f"{told}{' from ' + ', '.join(names) if names else ''}{f'; sha256 of the rows `{digest}`' if digest else ''}.",
    ]


def _results(adapted: Adapted) -> list[str]:
    metrics = adapted.record.metrics
    parts = [part for part in PARTS if isinstance(metrics.get(part), Mapping)]
    lines = []
    if parts:
        names = list(dict.fromkeys(name for part in parts for name in metrics[part]))
        best, greater = adapted.task.best_metric
        lines += [
            f"On the test rows; {best} counts, {'greater' if greater else 'lower'} is better.",
            "",
            f"| metric | {' | '.join(PARTS[part] for part in parts)} |",
            f"|---|{'---:|' * len(parts)}",
            *(f"| {name} | {' | '.join(_cell(metrics[part].get(name)) for part in parts)} |" for name in names),
        ]
    else:
        lines.append("It was not measured on test rows.")
    for part in [name for name in metrics if name not in PARTS and name != "train"]:
        if isinstance(metrics[part], Mapping):
            shown = ", ".join(f"{k} {_cell(v)}" for k, v in metrics[part].items() if isinstance(v, int | float))
            lines += ["", f"{TOLD[part].format(shown)}." if part in TOLD else f"{part}: {shown}."]
    return lines


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _limits(adapted: Adapted, name: str) -> list[str]:
    labels = getattr(adapted.task, "labels", ())
    lines = [f"- What {name} does not know or gets wrong, it may still: its weights are as they were."]
    if labels:
        lines.append(f"- It answers with its {len(labels)} labels and no others, also where none of them is right.")
    lines.append(
        "- The results hold for rows like the test rows; on others it is unmeasured."
        if "test" in adapted.record.metrics
        else "- How good it is, is unmeasured: try it on labelled rows of yours (`adapters evaluate`)."
    )
    return lines + [f"- {note}." for note in adapted.record.notes]


def _training(adapted: Adapted, manifest: Mapping[str, Any]) -> list[str]:
    record, fingerprint = adapted.record, manifest["backbone"]["fingerprint"]
    lines = [
        f"Trained: {adapted.trained_count:,} parameters in {len(manifest['tensors'])} tensors, "
        f"{adapted.adapter_bytes / 1e6:.2f} MB, by the strategy `{adapted.strategy.name}`; seed {record.seed}.",
        f"Backbone fingerprint: `{fingerprint['digest']}` ({len(fingerprint['tensors'])} tensors).",
    ]
    if record.settings:
        shown = ", ".join(f"{key} {_setting(value)}" for key, value in sorted(record.settings.items()))
        lines.append(f"Settings: {shown}.")
    run = record.metrics.get("train")
    if isinstance(run, Mapping):
        done = ", ".join(
            f"{run[key]:,.6g} {key.replace('_', ' ')}" for key in ("epochs", "steps", "seconds", "tokens") if key in run
        )
        held = journal.memory()
        peaks = ", ".join(
            f"{held[key] / 1e9:.2f} GB of {what}"
            for key, what in (("peak_memory", "memory"), ("peak_gpu_memory", "GPU memory"))
            if key in held
        )
        lines.append(f"Took: {done}{f'; at most {peaks}' if peaks else ''}, on {machine.said(machine.machine())}.")
    versions = ", ".join(f"{key} {value}" for key, value in manifest["versions"].items() if value)
    again = (
        "`adapters train run.yaml` repeats the run." if record.recipe else f"No recipe repeats it: {record.why_not}."
    )
    return [*lines, f"Versions: holdfast {manifest['holdfast']}, {versions}.", again]


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) < 80 else f"{text[:79]}…"


def _example(adapted: Adapted) -> str:
    first = next(iter(adapted.task.columns))
    return '["a text"]' if first == "text" else f'[{{"{first}": ...}}]'
