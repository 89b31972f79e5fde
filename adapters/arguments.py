"""The training arguments of a run: the house's defaults, the strategy's, and the caller's on top."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from adapters.contracts import Adapted
from adapters.errors import RequestError, message, nearest

logger = logging.getLogger(__name__)

PATIENCE = 3  # evaluations without improvement before training stops
# What every strategy starts from; a strategy's own `defaults` and the caller's arguments come on top.
HOUSE: Mapping[str, object] = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.06,  # below 1: a share of all steps
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "logging_steps": 20,
    "save_total_limit": 2,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
}
OWN = {
    "early_stopping_patience": "evaluations without improvement before training stops; None trains to the end",
    "frozen_dropout": "keep dropout on in the frozen part below the lowest trained module",
}
ALIASES = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "warmup_ratio": "warmup_steps (a number below 1 is a share)",
    "group_by_length": "train_sampling_strategy",
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "lr_scheduler": "lr_scheduler_type",
}

_PLAIN: dict[str, dict[str, Any]] = {}


def check_fields(given: Mapping[str, Any]) -> None:
    """Refuse training settings that do not exist.

    Raises:
        RequestError: with the right name, or the nearest ones.
    """
    known = {entry.name for entry in dataclasses.fields(TrainingArguments) if entry.init} | set(OWN)
    faults = []
    for name in given:
        if name not in known:
            right = ALIASES.get(name)
            remedy = f"The name is {right}." if right else nearest(name, known)
            faults.append(message(f"unknown training setting {name!r}", where="args", remedy=remedy))
        else:
            faults += _value_faults(name, given[name])
    if faults:
        raise RequestError(" ".join(faults))
    made(TrainingArguments, {"output_dir": "unused", **{n: v for n, v in given.items() if n not in OWN}})


def _value_faults(name: str, value: Any) -> list[str]:
    """What is wrong with a value, told from the kind of transformers' default and the settings' plain limits."""
    if name == "early_stopping_patience":
        fine = value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
        expected = "a whole number > 0, or null"
    elif name == "frozen_dropout":
        fine, expected = isinstance(value, bool), "true or false"
    else:
        default = _plain(TrainingArguments)[name]
        numeric = isinstance(default, int | float) and not isinstance(default, bool)
        fine = not numeric or (isinstance(value, int | float) and not isinstance(value, bool))
        expected = "a number"
        if fine and name in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            fine, expected = isinstance(value, int) and value > 0, "a whole number > 0"
        if fine and name == "learning_rate":
            fine, expected = value >= 0, "a number >= 0"
    return [] if fine else [message("a wrong value", where=f"args: {name}", expected=expected, found=repr(value))]


def made(kind: type[TrainingArguments], options: Mapping[str, Any]) -> TrainingArguments:
    """Training arguments, with transformers' own complaints as errors of ours."""
    try:
        return kind(**options)
    except (ValueError, TypeError) as fault:
        raise RequestError(
            message(
                "transformers refuses the training settings", where="args", found=" ".join(str(fault).split())[:300]
            )
        ) from fault


def settings(
    adapted: Adapted, args: TrainingArguments | Mapping[str, Any] | None, *, evaluated: bool, own_metrics: bool
) -> tuple[TrainingArguments, dict[str, Any]]:
    """The training arguments of a run, and our own settings beside them.

    Args:
        adapted: whose strategy's defaults apply.
        args: a mapping is taken literally; of a `TrainingArguments` whatever differs from transformers' defaults;
            None for the defaults alone.
        evaluated: there are validation rows: evaluate and save once an epoch, keep the best, stop early.
        own_metrics: the caller computes metrics: the loss chooses the best weights unless said otherwise.
    """
    kind: type[TrainingArguments] = TrainingArguments
    _plain(kind)
    if args is None:
        given: dict[str, Any] = {}
    elif isinstance(args, Mapping):
        given = dict(args)
        check_fields(given)
    elif not isinstance(args, TrainingArguments):
        raise RequestError(
            message(
                "not training settings",
                where="args",
                expected="TrainingArguments, a dict or None",
                found=type(args).__name__,
            )
        )
    else:
        kind = type(args)
        plain = _plain(kind)
        given = {
            entry.name: getattr(args, entry.name)
            for entry in dataclasses.fields(args)
            if entry.init and getattr(args, entry.name) != plain[entry.name]
        }
        given["output_dir"] = args.output_dir
    own = {name: given.pop(name) for name in OWN if name in given}
    merged: dict[str, Any] = {**HOUSE, "seed": adapted.record.seed}
    for name, value in adapted.strategy.defaults.items():
        merged[name] = value(adapted.model) if callable(value) else value
    merged["dataloader_pin_memory"] = torch.cuda.is_available()
    if not evaluated:
        merged["eval_strategy"] = "no"
    filled = {name: value for name, value in merged.items() if name not in given}
    if args is not None and not isinstance(args, Mapping) and filled:
        logger.info(
            "settings at transformers' defaults are taken as not set; used instead: %s (a dict is taken literally)",
            ", ".join(f"{name}={value}" for name, value in sorted(filled.items())),
        )
    merged |= given
    # Checkpoints follow evaluations unless the caller says when to save.
    if "save_strategy" not in given and merged["eval_strategy"] != "no":
        merged["save_strategy"] = merged["eval_strategy"]
        if "eval_steps" in given and "save_steps" not in given:
            merged["save_steps"] = given["eval_steps"]
    if evaluated and "metric_for_best_model" not in merged:
        metric, greater = ("loss", False) if own_metrics else adapted.task.best_metric
        merged["metric_for_best_model"], merged["greater_is_better"] = metric, greater
    # transformers would delete and reload by its own rules; both are done here.
    merged |= {"load_best_model_at_end": False, "remove_unused_columns": False, "logging_nan_inf_filter": False}
    merged.setdefault("output_dir", str(_fresh(f"{adapted.task.name}-{adapted.strategy.name}")))
    return made(kind, merged), own


def _fresh(stem: str) -> Path:
    number = 1
    while (folder := Path("runs") / f"{stem}-{number}").exists():
        number += 1
    return folder


def _plain(kind: type[TrainingArguments]) -> dict[str, Any]:
    """transformers' own defaults, as they are after its own checks.

    Made once and before the arguments of a run: making one resets the state that a prepared trainer computes with.
    """
    if kind.__qualname__ not in _PLAIN:
        plain = kind(output_dir="unused")
        _PLAIN[kind.__qualname__] = {e.name: getattr(plain, e.name) for e in dataclasses.fields(plain) if e.init}
    return _PLAIN[kind.__qualname__]


def changed(arguments: TrainingArguments) -> dict[str, Any]:
    """The training arguments that differ from transformers' defaults, as plain data."""
    plain = _plain(type(arguments))
    skipped = {"output_dir", "logging_dir", "run_name", "hub_token"}
    return {
        name: getattr(value, "value", value)
        for name in sorted(plain)
        if name not in skipped
        and (value := getattr(arguments, name)) != plain[name]
        and isinstance(value, str | int | float | bool)
    }
