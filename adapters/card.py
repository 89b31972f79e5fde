"""The model card of an adapter folder: only what is known, nothing to be filled in later."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.contracts import Adapted


def card(adapted: Adapted, manifest: Mapping[str, Any]) -> str:
    """The text of README.md: front matter for the hub, facts, metrics, and how to load it."""
    from huggingface_hub import ModelCardData

    backbone = adapted.record.backbone
    on_hub = bool(backbone) and not Path(backbone).expanduser().exists()
    data = ModelCardData(
        library_name="holdfast",
        base_model=backbone if on_hub else None,
        pipeline_tag=adapted.task.pipeline,
        tags=["adapters", adapted.strategy.name],
    )
    lines = [
        "---",
        data.to_yaml(),
        "---",
        f"# {adapted.strategy.name} adapter for {Path(backbone).name if backbone else type(adapted.model).__name__}",
        "",
        f"Task: {adapted.task.describe()}.",
        f"Backbone fingerprint: `{manifest['backbone']['fingerprint']['digest']}` "
        f"({len(manifest['backbone']['fingerprint']['tensors'])} tensors).",
        f"Trained: {adapted.trained_count:,} parameters in {len(manifest['tensors'])} tensors, "
        f"{adapted.adapter_bytes / 1e6:.2f} MB.",
        "",
    ]
    for part, numbers in adapted.record.metrics.items():
        if isinstance(numbers, Mapping):
            shown = ", ".join(f"{k} {v:.4g}" for k, v in numbers.items() if isinstance(v, int | float))
            lines.append(f"- {part}: {shown}")
    lines += [
        "",
        "```python",
        "import adapters",
        "",
        'adapted = adapters.load("this folder")',
        f"adapters.predict(adapted, {_example(adapted)})",
        "```",
        "",
    ]
    return "\n".join(lines)


def _example(adapted: Adapted) -> str:
    first = next(iter(adapted.task.columns))
    return '["a text"]' if first == "text" else f'[{{"{first}": ...}}]'
