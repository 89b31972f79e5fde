"""Whether a merged folder answers as the adapted model does: outputs of both, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from adapters.pixels import noise

ROWS = 8  # rows of the check
BATCH = 32  # rows per forward pass
LENGTH = 24  # tokens of a synthetic row, where the model takes so many


def compare(adapter: str, merged: str, base: str, rows: list[Any] | None) -> dict[str, Any]:
    """Max and mean difference of the outputs, agreement of the best answers, spread of the outputs, dtype at work.

    Args:
        adapter: the adapter folder.
        merged: the plain transformers folder.
        base: the backbone's folder.
        rows: raw rows of the task, or bare values of its first column; None makes inputs at random (pictures of noise
            for an image processor).
    """
    import torch
    import transformers

    from adapters.storage import load

    adapted = load(adapter, base, verify="fast")
    if not rows and adapted.processor is not None and adapted.model.main_input_name == "pixel_values":
        rows = list(noise(ROWS, adapted.model))
    batches = _of_rows(adapted, rows) if rows and adapted.processor is not None else [synthetic(adapted.model)]
    wanted = outputs(adapted.model, batches)
    dtype = str(adapted.model.dtype).removeprefix("torch.")
    auto: Any = getattr(transformers, adapted.task.auto_class)
    del adapted
    found = outputs(auto.from_pretrained(merged, dtype="auto", trust_remote_code=False), batches)
    difference = torch.cat([(one - other).abs().flatten() for one, other in zip(wanted, found, strict=True)])
    return {
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "agreement": float(torch.cat([_agree(one, other) for one, other in zip(wanted, found, strict=True)]).mean()),
        "spread": float(torch.cat([one.flatten() for one in wanted]).std()),
        "dtype": dtype,
    }


def _agree(one: Any, other: Any) -> Any:
    """1 where the best answer is the same: the last dimension's greatest, or for a single number its value."""
    import torch

    if one.shape[-1] > 1:
        return (one.argmax(-1) == other.argmax(-1)).float().flatten()
    return torch.isclose(one, other, rtol=1e-3, atol=1e-5).float().flatten()


def outputs(model: Any, batches: Sequence[dict[str, Any]]) -> list[Any]:
    """What the head gives for each batch: logits, or the start and end logits of an answer."""
    import torch

    model.eval()
    found = []
    with torch.inference_mode():
        for batch in batches:
            outputs = model(**batch)
            found += [_seen(outputs[name].float(), batch) for name in outputs if name.endswith("logits")]
    return found


def _seen(logits: Any, batch: dict[str, Any]) -> Any:
    """The logits of a sequence where it is no padding; what stands there means nothing."""
    mask = batch.get("attention_mask")
    if mask is None or logits.ndim != 3 or logits.shape[:2] != mask.shape or "decoder_input_ids" in batch:
        return logits
    return logits[mask.bool()]


def _of_rows(adapted: Any, rows: list[Any]) -> list[dict[str, Any]]:
    """The task's own batches from raw rows, without labels."""
    from datasets import Dataset

    first = next(iter(adapted.task.columns))
    raw = Dataset.from_list([row if isinstance(row, dict) else {first: row} for row in rows])
    prepared, _ = adapted.task.prepare(raw, adapted.processor, adapted.model, labelled=False)
    batches = []
    for start in range(0, len(prepared), BATCH):
        features = [prepared[index] for index in range(start, min(start + BATCH, len(prepared)))]
        batch = adapted.task.collate(features, adapted.model, adapted.processor)
        batches.append(_complete(adapted.model, {n: v for n, v in batch.items() if n not in ("row", "labels")}))
    return batches


def synthetic(model: Any) -> dict[str, Any]:
    """Inputs at random that the model takes: pixels, or token ids from its vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    config = model.config.get_text_config()
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", LENGTH) or LENGTH
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.randn((ROWS, config.num_channels, height, width), generator=generator)}
    length = min(LENGTH, getattr(config, "max_position_embeddings", LENGTH) or LENGTH)
    low = min(8, config.vocab_size - 1)  # the first ids are padding and the like
    ids = torch.randint(low, config.vocab_size, (ROWS, length), generator=generator)
    end = config.eos_token_id
    if config.is_encoder_decoder and isinstance(end, int):
        ids[:, -1] = end  # encoder-decoders classify by the state at the end token
    return _complete(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def _complete(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """A decoder's first tokens, for models that generate and were given no target: its start token, then the source."""
    import torch

    if model.config.is_encoder_decoder and model.can_generate() and "decoder_input_ids" not in batch:
        start = model.config.get_text_config().decoder_start_token_id
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        first = torch.full((len(batch["input_ids"]), 1), 0 if start is None else start)
        batch["decoder_input_ids"] = torch.cat([first, batch["input_ids"][:, :7].remainder(vocabulary)], 1)
    return batch


def main(request: str) -> None:
    """Read a request as JSON and print the comparison as the last line of standard output."""
    print(json.dumps(compare(**json.loads(request))))
