"""The training arguments of a run: the house's defaults, the strategy's, and the caller's on top."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from adapters import processes, sharded, zero
from adapters.contracts import Adapted
from adapters.errors import RequestError, message
from adapters.order import frozen_below
from adapters.settings import OWN, SETTLED, WATCHING
from adapters.settings import faults as settings_faults

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
    "restore_callback_states_from_checkpoint": True,  # a resumed run goes on counting its patience
}
# On top of it where a recipe's rows are a stream, an epoch of which may be longer than the run; below 1: a share of all
# steps. A stream of the caller's own is evaluated and saved once an epoch, as any other rows.
STREAMED: Mapping[str, object] = {
    "eval_strategy": "steps",
    "eval_steps": 0.1,
    "save_strategy": "steps",
    "save_steps": 0.1,
}
_PLAIN: dict[str, dict[str, Any]] = {}


def check_fields(given: Mapping[str, Any], *, own_metrics: bool = False) -> None:
    """Refuse training settings that do not exist, cannot be, or would do nothing here.

    Args:
        given: names and values, taken literally.
        own_metrics: the caller computes metrics.

    Raises:
        RequestError: every fault at once, with the right names.
    """
    _refuse(given, own_metrics)
    made(TrainingArguments, {"output_dir": "unused", **HOUSE, **_taken(given)})


def _refuse(given: Mapping[str, Any], own_metrics: bool, *, literal: bool = True) -> None:
    faults = processes.sharding(given) + settings_faults(given, own_metrics=own_metrics, literal=literal)
    if not faults and given.get("report_to") is not None:
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        installed: list[str] = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
        wanted = [given["report_to"]] if isinstance(given["report_to"], str) else given["report_to"]
        if not set(wanted) <= {*installed, "all", "none"}:
            expected = f"of what is installed: {', '.join([*installed, 'none'])}"
            found = repr(given["report_to"])
            faults = [message("a wrong value", where="args: report_to", expected=expected, found=found)]
    if faults:
        raise RequestError(*faults)


def _taken(given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the given goes to transformers: without our own settings and those that are settled here."""
    taken = {name: value for name, value in given.items() if name not in (*OWN, *SETTLED, "deepspeed")}
    for kind in ("eval", "save"):  # a number of steps asks for steps
        if taken.get(f"{kind}_steps") is not None:
            taken.setdefault(f"{kind}_strategy", "steps")
    return taken


def made(kind: type[TrainingArguments], options: Mapping[str, Any]) -> TrainingArguments:
    """Training arguments, with transformers' own complaints as errors of ours."""
    with complaints(), processes.saying(processes.ZERO, None):
        return kind(**options)


@contextlib.contextmanager
def complaints() -> Iterator[None]:
    """What transformers refuses about the settings, as an error of ours."""
    try:
        yield
    except RequestError:
        raise
    except (ValueError, TypeError) as fault:
        raise RequestError(
            message(
                "transformers refuses the training settings", where="args", found=" ".join(str(fault).split())[:300]
            )
        ) from fault


def settings(
    adapted: Adapted,
    args: TrainingArguments | Mapping[str, Any] | None,
    *,
    evaluated: bool,
    own_metrics: bool,
    parts: Sequence[str] = (),
    streamed: bool = False,
) -> tuple[TrainingArguments, dict[str, Any]]:
    """The training arguments of a run, and our own settings beside them.

    Args:
        adapted: whose strategy's defaults apply.
        args: a mapping is taken literally; of a `TrainingArguments` whatever differs from transformers' defaults;
            None for the defaults alone.
        evaluated: there are validation rows: evaluate and save once an epoch, keep the best, stop early.
        own_metrics: the caller computes metrics: the loss chooses the best weights unless said otherwise.
        parts: names of the validation sets where there are several; the first chooses unless said otherwise.
        streamed: the training rows are a recipe's stream: evaluate and save after a share of the steps.

    Raises:
        RequestError: settings that do not exist, cannot be, or would do nothing here.
    """
    kind, given = _given(args, own_metrics)
    own = {name: given[name] for name in OWN if name in given}
    if given.get("bf16") is False and own.get("fused", True):
        own["fused"] = "float32"
    literal = _taken(given)
    _refuse_unheard(adapted, {**given, **literal}, own, evaluated)
    merged: dict[str, Any] = {**HOUSE, "seed": adapted.record.seed}
    for name, value in adapted.strategy.defaults.items():
        merged[name] = value(adapted.model) if callable(value) else value
    warm = merged.pop("warm_learning_rate", None)
    if warm is not None and "learning_rate" not in literal:
        own.setdefault("warm_learning_rate", warm)
    merged["dataloader_pin_memory"] = torch.cuda.is_available()
    if streamed:
        merged |= STREAMED
    if not evaluated:
        merged["eval_strategy"] = "no"
    filled = {name: value for name, value in merged.items() if name not in literal}
    if args is not None and not isinstance(args, Mapping) and filled:
        logger.info(
            "settings at transformers' defaults are taken as not set; used instead: %s (a dict is taken literally)",
            ", ".join(f"{name}={value}" for name, value in sorted(filled.items())),
        )
    merged |= literal
    # Checkpoints follow evaluations unless the caller says when to save.
    if "save_strategy" not in literal and merged["eval_strategy"] != "no":
        merged["save_strategy"] = merged["eval_strategy"]
        if literal.get("eval_steps") is not None:
            merged["save_steps"] = literal["eval_steps"]
    if evaluated:
        merged |= _best(adapted, merged, own_metrics, parts)
    # transformers would delete, reload and choose columns by its own rules; here that is the trainer's and the task's.
    merged |= {name: given[name] for name in SETTLED if name in given}
    merged |= {"load_best_model_at_end": False, "remove_unused_columns": False, "logging_nan_inf_filter": False}
    asked = processes.fsdp(literal)
    if asked is not None:
        merged |= {"fsdp": True, "fsdp_config": sharded.config(adapted.model, asked)}
    divided = processes.deepspeed(given)
    if divided is not None:
        trained = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
        own["deepspeed"] = zero.config(divided, trained)
    merged.setdefault("output_dir", str(_fresh(f"{adapted.task.name}-{adapted.strategy.name}")))
    return made(kind, merged), own


def one_gpu(arguments: TrainingArguments) -> str:
    """Keep a run of one process to one GPU, and say what leaves the others idle; empty where there are no others.

    transformers would let torch's DataParallel divide every batch among all of them, and multiply the rows of a step by
    their number: another run than was asked for, and slower than a process for each.
    """
    several = arguments.n_gpu
    if several <= 1:
        return ""
    arguments._n_gpu = 1
    return f"one of {several} GPUs is used; accelerate launch --num_processes {several} takes all of them"


def asks_for_steps(args: TrainingArguments | Mapping[str, Any] | None) -> bool:
    """Whether the caller says how many steps are taken, or how long they are: then a probe is stepped, not solved."""
    named = ("num_train_epochs", "max_steps", "learning_rate")
    if args is None or isinstance(args, Mapping):
        return any((args or {}).get(name) is not None for name in named)
    plain = _plain(type(args))
    return any(getattr(args, name) != plain[name] for name in named)


def _given(
    args: TrainingArguments | Mapping[str, Any] | None, own_metrics: bool
) -> tuple[type[TrainingArguments], dict[str, Any]]:
    """The class of the arguments, and what the caller said, checked."""
    _plain(TrainingArguments)
    if args is None:
        _refuse({}, own_metrics)
        return TrainingArguments, {}
    if isinstance(args, Mapping):
        check_fields(args, own_metrics=own_metrics)
        return TrainingArguments, dict(args)
    if not isinstance(args, TrainingArguments):
        raise RequestError(
            message(
                "not training settings",
                where="args",
                expected="TrainingArguments, a dict or None",
                found=type(args).__name__,
            )
        )
    plain = _plain(type(args))
    given = {
        entry.name: getattr(args, entry.name)
        for entry in dataclasses.fields(args)
        if entry.init and getattr(args, entry.name) != plain[entry.name]
    }
    if given.get("greater_is_better") == (not str(given.get("metric_for_best_model")).endswith("loss")):
        given.pop("greater_is_better", None)  # filled in by transformers from the metric's name: not set
    _refuse(given, own_metrics, literal=False)
    return type(args), {**given, "output_dir": args.output_dir}


def _refuse_unheard(adapted: Adapted, given: Mapping[str, Any], own: Mapping[str, Any], evaluated: bool) -> None:
    """Refuse what could not be heard in this run: evaluations without rows, noise where nothing is noisy."""
    chosen = str(getattr(given.get("eval_strategy"), "value", given.get("eval_strategy")))
    faults = []
    if not evaluated and (chosen not in ("None", "no") or given.get("load_best_model_at_end")):
        name = next(n for n in ("load_best_model_at_end", "eval_steps", "eval_strategy") if given.get(n))
        faults.append(message("validation without rows", where=f"args: {name}", remedy="Give an eval_dataset."))
    if evaluated and chosen == "no":
        for name in ("early_stopping_patience", "load_best_model_at_end"):
            if given.get(name):
                remedy = "Say eval_strategy='epoch' or 'steps'."
                faults.append(message("the run is never evaluated", where=f"args: {name}", remedy=remedy))
    if given.get("neftune_noise_alpha") and not own.get("frozen_dropout"):
        embeddings = adapted.model.get_input_embeddings()
        if any(module is embeddings for module in frozen_below(adapted.model, adapted.trained)):
            what = "noise on embeddings that lie below all that trains, where everything runs as in evaluation"
            remedy = "Say frozen_dropout=True as well."
            faults.append(message(what, where="args: neftune_noise_alpha", remedy=remedy))
    if faults:
        raise RequestError(*faults)


def _best(adapted: Adapted, merged: Mapping[str, Any], own_metrics: bool, parts: Sequence[str]) -> dict[str, Any]:
    """What chooses the best weights, and which way is better; the schedules that watch it are told so, too."""
    loss_alone = own_metrics or bool(merged.get("prediction_loss_only"))
    best, up = ("loss", False) if loss_alone else adapted.task.best_metric
    metric, greater = merged.get("metric_for_best_model"), merged.get("greater_is_better")
    if metric is None:
        metric, greater = f"{parts[0]}_{best}" if parts else best, up
    elif greater is None:
        known = {"loss": False} | dict([adapted.task.best_metric])
        bare = next((name for name in known if str(metric) == name or str(metric).endswith(f"_{name}")), None)
        greater = known[bare] if bare else None
    chosen: dict[str, Any] = {"metric_for_best_model": metric, "greater_is_better": greater}
    if str(getattr(merged.get("lr_scheduler_type"), "value", merged.get("lr_scheduler_type"))) in WATCHING:
        up = greater if greater is not None else True
        chosen["lr_scheduler_kwargs"] = {"mode": "max" if up else "min", **(merged.get("lr_scheduler_kwargs") or {})}
    return chosen


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
