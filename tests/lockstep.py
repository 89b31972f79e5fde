"""Runs of a few steps, in one process or in several, and what they come to as plain data."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import cells
import tiny

import adapters
from adapters import ranks

QUIET = {"disable_tqdm": True, "report_to": "none", "logging_steps": 1}
STEP = 6  # rows of a step
ROWS = 13  # two whole steps an epoch and one of a single row, which most processes have none of
STILL = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "dropout_rate")
STILL += ("attn_pdrop", "embd_pdrop", "resid_pdrop", "activation_dropout")  # what draws of its own in every process


@dataclasses.dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        task, kind, strategy: of the run.
        options: of the strategy and the task.
        args: of the run, beside those of all.
        rows: to train on.
        dtype: of the backbone.
        added: tokens that it gets.
        headless: the backbone is a folder without a head, which loading makes anew.
    """

    task: str = "text-classification"
    kind: str = "bert"
    strategy: str = "lora"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: int = ROWS
    dtype: str = "float64"
    added: tuple[str, ...] = ()
    headless: bool = False


def uneven(task: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a task that differ in length, so that processes have other numbers of tokens and loss items."""
    made = []
    for number, row in enumerate(cells.rows(task, n, seed=seed)):
        more = tiny.FILLER[: 1 + (5 * number) % 7]
        if "tokens" in row:
            row = {"tokens": row["tokens"] + more, "tags": row["tags"] + ["O"] * len(more)}
        for name in ("text", "context", "source", "target"):
            if name in row:
                row = {**row, name: " ".join([row[name], *more])}
        made.append(row)
    return made


def model(case: Case, *, noisy: bool = False) -> Any:
    """A small backbone, without dropout unless it is to be noisy."""
    import torch

    auto = adapters.tasks.TASKS[case.task].auto_class
    known = tiny.config(case.kind).to_dict()
    still = {name: 0.0 for name in STILL if name in known and not noisy}
    return tiny.model(case.kind, auto=auto, dtype=getattr(torch, case.dtype), **still)


def trainer(
    folder: str | Path, case: Case, batch: int, accumulation: int = 1, *, noisy: bool = False, **others: Any
) -> adapters.Trainer:
    """The trainer of a case, whose step is divided into micro-batches of so many rows."""
    options = {"lora_dropout": 0.0} if case.strategy in ("lora", "dora", "qlora") else {}
    options |= {**cells.TASK_OPTIONS.get(case.task, {}), **cells.OPTIONS.get(case.strategy, {}), **case.options}
    base: Any = model(case, noisy=noisy)
    if case.headless:
        place = Path(folder).with_name(f"{Path(folder).name}-base")
        ranks.by_first(functools.partial(base.bert.save_pretrained, place))  # transformers writes in one process alone
        base = str(place)
    adapted = adapters.adapt(
        base,
        case.strategy,
        task=case.task,
        processor=tiny.processor(case.kind),
        added_tokens=list(case.added),
        **options,
    )
    given = {"output_dir": str(folder), **QUIET, "learning_rate": 1e-3, "num_train_epochs": 1, "save_strategy": "no"}
    given |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, **case.args}
    given |= {"per_device_eval_batch_size": 2}
    if given["num_train_epochs"] is None:
        del given["num_train_epochs"], given["learning_rate"]
    rows = uneven(case.task, case.rows)
    return adapters.Trainer(adapted, given, rows, others.pop("held", uneven(case.task, 5, seed=1)), **others)


def told(found: adapters.Trainer) -> dict[str, Any]:
    """What a run logged, without what tells the time, and its trained tensors."""
    timed = ("_runtime", "_time", "_per_second", "flos")
    log = [{n: v for n, v in entry.items() if not n.endswith(timed)} for entry in found.state.log_history]
    state = {name: tensor.double().tolist() for name, tensor in found.adapted.state().items()}
    return {"log": log, "state": state, "notes": found.remarks, "tokens": found._throughput.totals().get("tokens")}


def laws(
    folder: str, given: list[dict[str, Any]], splits: list[list[int]], before: str | None = None
) -> list[dict[str, Any]]:
    """Each case trained in this number of processes, with the micro-batches of its turn.

    Args:
        folder: for the runs.
        given: the cases.
        splits: rows of a micro-batch, and how many make a step of one process.
        before: the same folder of another number of processes, from whose checkpoint the first case goes on at last;
            then, too, with a step of another size, whose refusal comes behind.
    """
    ranks.join()
    found = []
    for number, one in enumerate(given):
        batch, accumulation = splits[number % len(splits)]
        made = trainer(Path(folder) / str(number), Case(**one), batch, accumulation)
        made.train()
        found.append(told(made))
    if before is not None:
        batch, accumulation = splits[0]
        place = str(Path(before) / "0" / "checkpoint-2")  # in the midst of an epoch
        made = trainer(Path(folder) / "onward", Case(**given[0]), batch, accumulation)
        made.train(resume_from_checkpoint=place)
        found.append(told(made))
        made = trainer(Path(folder) / "other", Case(**given[0]), batch + 1, accumulation)
        try:
            made.train(resume_from_checkpoint=place)
        except adapters.RequestError as fault:
            found.append({"refusal": str(fault)})
    return found
