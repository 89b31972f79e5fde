"""Runs of a few steps in one process or in several, and what they come to, as plain data."""

from __future__ import annotations

from typing import Any

import tiny

import adapters
from adapters import ranks

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1}


def trainer(folder: str, strategy: str = "lora", rows: int = 22, **args: Any) -> adapters.Trainer:
    adapted = adapters.adapt(
        tiny.model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        strategy,
        processor=tiny.tokenizer(),
        labels=list(tiny.LABELS),
    )
    given = {"output_dir": folder, **QUIET, "learning_rate": 1e-3, "num_train_epochs": 2, **args}
    return adapters.Trainer(adapted, given, tiny.rows(rows), tiny.rows(11, seed=1))


def told(found: adapters.Trainer) -> dict[str, Any]:
    timed = ("_runtime", "_per_second", "flos")
    log = [{n: v for n, v in entry.items() if not n.endswith(timed)} for entry in found.state.log_history]
    state = {name: tensor.double().tolist() for name, tensor in found.adapted.state().items()}
    return {"log": log, "state": state, "rank": ranks.rank()}


def classify(folder: str, strategy: str, batch: int, accumulation: int = 1) -> dict[str, Any]:
    ranks.join()
    one = trainer(folder, strategy, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    one.train()
    return told(one)
