"""Whether a merged folder answers as the adapted model does: logits of both, in a process of its own."""

from __future__ import annotations

import json
from typing import Any

ROWS = 8  # rows of the check
BATCH = 32  # rows per forward pass
LENGTH = 24  # tokens of a synthetic row, where the model takes so many


def compare(adapter: str, merged: str, base: str, rows: list[str] | None) -> dict[str, Any]:
    """Max and mean difference of the logits, agreement of the best answers, spread of the logits, dtype at work.

    Args:
        adapter: the adapter folder.
        merged: the plain transformers folder.
        base: the backbone's folder.
        rows: texts; None makes token ids at random.
    """
    import torch
    import transformers

    from adapters.storage import load

    adapted = load(adapter, base, verify="fast")
    inputs = _inputs(adapted.model, adapted.processor, rows)
    wanted = _logits(adapted.model, inputs)
    dtype = str(adapted.model.dtype).removeprefix("torch.")
    auto: Any = getattr(transformers, adapted.task.auto_class)
    del adapted
    found = _logits(auto.from_pretrained(merged, dtype="auto"), inputs)
    difference = (wanted - found).abs()
    if wanted.shape[-1] > 1:
        agreement = float((wanted.argmax(-1) == found.argmax(-1)).float().mean())
    else:
        agreement = float(torch.isclose(wanted, found, rtol=1e-3, atol=1e-5).float().mean())
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": agreement,
        "spread": float(wanted.std()),
        "dtype": dtype,
    }


def _logits(model: Any, inputs: dict[str, Any]) -> Any:
    import torch

    model.eval()
    rows = len(next(iter(inputs.values())))
    with torch.inference_mode():
        parts = [
            model(**{name: value[start : start + BATCH] for name, value in inputs.items()}).logits.float()
            for start in range(0, rows, BATCH)
        ]
    return torch.cat(parts)


def _inputs(model: Any, processor: Any, rows: list[str] | None) -> dict[str, Any]:
    import torch

    if rows and processor is not None:
        return dict(processor(rows, return_tensors="pt", padding=True, truncation=True, max_length=128))
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH) or LENGTH)
    low = min(8, config.vocab_size - 1)  # the first ids are padding and the like
    ids = torch.randint(low, config.vocab_size, (ROWS, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main(request: str) -> None:
    """Read a request as JSON and print the comparison as the last line of standard output."""
    print(json.dumps(compare(**json.loads(request))))
