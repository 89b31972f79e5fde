"""One probe beside many over the same features, in a process of its own: MiniLM read once, the mean of its last layer.

A setting is an L2 penalty. What one costs is reading the rows and solving it; what many cost is reading the same rows
once and solving all of them together.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.harness import Clock, machine, peak_memory, serve

BATCH = 64
RANGE = (-5.0, -1.0)  # powers of ten between which the penalties lie
ALONE = 1e-3  # the penalty of the one


def features(texts: list[str], tokenizer: Any, model: Any) -> Any:
    """The mean over each text's tokens of the last hidden states, texts of like length together."""
    import torch

    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    found: Any = torch.empty(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), BATCH):
        rows = order[begin : begin + BATCH]
        batch = tokenizer([texts[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            states = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        found[rows] = (states * mask).sum(1) / mask.sum(1)
    return found


def answer(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of one setting and of many, the same features under both; the accuracy of the best of them."""
    import torch
    import transformers

    from adapters import solve
    from benchmarks.texts import MINILM, backbone, draw

    where, parts = backbone(MINILM), draw(request["data"], request["train"], request["test"])
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(where), transformers.AutoModel.from_pretrained(where)
    model.eval()
    labels = torch.tensor([parts.labels.index(row["label"]) for row in parts.train])
    count = request["settings"]
    penalties = [10**power for power in torch.linspace(*RANGE, count).tolist()]

    def loss(logits: Any, right: Any, items: int) -> Any:
        return torch.nn.functional.cross_entropy(logits, right, reduction="sum") / items

    reading, alone, together = Clock(), Clock(), Clock()
    with reading.running():
        read = features([row["text"] for row in parts.train], tokenizer, model)
    with alone.running():
        solve.probes([read], labels, loss, len(parts.labels), [ALONE])
    with together.running():
        (layers,) = solve.probes([read], labels, loss, len(parts.labels), penalties)
    tests = features([row["text"] for row in parts.test], tokenizer, model)
    truth = torch.tensor([parts.labels.index(row["label"]) for row in parts.test])
    shares = [float((layer.logits(tests).argmax(-1) == truth).float().mean()) for layer in layers]
    took = [clock.took for clock in (reading, alone, together)]
    return {
        "seconds": took[0].seconds + took[2].seconds,
        "cpu_seconds": took[0].cpu_seconds + took[2].cpu_seconds,
        "others_cores": took[0].others_cores,
        "accuracy": max(shares),
        "peak_bytes": peak_memory(),
        "machine": machine("cpu"),
        "more": {"one": took[0].seconds + took[1].seconds, "solving": [took[1].seconds, took[2].seconds]},
    }


if __name__ == "__main__":
    serve(answer)
