"""What makes a run the run that it is, and what a resume may change about it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerState, TrainingArguments

from adapters import checkpoints, facts, manifest, randomness, ranks, shards
from adapters.contracts import Adapted
from adapters.errors import BackboneError, FolderError, RequestError, message, nearest
from adapters.exchange import short
from adapters.fingerprint import Fingerprint
from adapters.settings import WATCHING

# As transformers names them.
STATE, OPTIMIZER, SCHEDULER, SCALER = "trainer_state.json", "optimizer.pt", "scheduler.pt", "scaler.pt"
RANDOM = "rng_state.pth"

# Training arguments that change neither weights nor metrics: names, or how names begin.
_IDLE = (
    *("output_dir", "disable_tqdm", "report_to", "run_name", "project", "debug", "skip_memory_metrics"),
    *("log_", "logging_", "save_", "hub_", "push_to_hub", "trackio_", "do_", "ddp_", "include_", "past_index"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "dataloader_", "resume_from_checkpoint"),
    *("restore_callback_states_from_checkpoint", "fsdp", "local_rank", "parallelism_config", "enable_jit_checkpoint"),
)
# What no override changes: the tensors, their optimizer's state, and the position in the data would not fit.
_FIXED = ("backbone", "strategy", "task", "quantization", "optim", "optimizers", "rows", "rows_per_step")
# How the rows of a step are divided: free to change with the number of processes.
_DIVISION = ("processes", "per_device_train_batch_size", "gradient_accumulation_steps")
_SCHEDULE = {
    "learning_rate",
    "warm_learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "num_train_epochs",
    "max_steps",
}


def terms(
    adapted: Adapted,
    args: TrainingArguments,
    data: Mapping[str, Mapping[str, Any]],
    handler: Any,
    *,
    own: Mapping[str, Any],
    optimizers: Sequence[Any],
) -> dict[str, Any]:
    """Everything that weights, losses and metrics of a run depend on, as flat plain data.

    Args:
        adapted: what trains.
        args: the run's training arguments.
        data: fingerprints: "data" of the training rows, "validation_data..." of others.
        handler: of the run's callbacks; those that stop early count.
        own: our own settings beside the arguments.
        optimizers: the caller's own optimizer and schedule, or Nones.
    """
    found: dict[str, Any] = {
        "strategy": adapted.strategy.name,
        **{f"strategy.{name}": value for name, value in facts.options_of(adapted.strategy).items()},
        "task": adapted.task.name,
        **{f"task.{name}": value for name, value in facts.options_of(adapted.record.task or adapted.task).items()},
        "quantization": adapted.storage.quantization,
        "dtype": str(adapted.model.dtype).removeprefix("torch."),
        "device": args.device.type,
        "rows": data["data"]["rows"],
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        **({"processes": args.world_size} if args.world_size > 1 else {}),
        **{name: entry["sha256"] for name, entry in data.items()},
        "early_stopping_patience": [callback.early_stopping_patience for callback in _stopping(handler)],
        "frozen_dropout": bool(own.get("frozen_dropout")),
        "fused": own.get("fused", True),
    }
    if own.get("warm_head") is not None:
        found["warm_head"] = own["warm_head"]
    if own.get("warm_learning_rate") is not None:
        found["warm_learning_rate"] = own["warm_learning_rate"]
    if data["data"]["rows"] is None:  # workers divide a stream
        found["dataloader_num_workers"] = args.dataloader_num_workers
        found["shuffle_buffer"] = own.get("shuffle_buffer")
    if optimizers[0] is not None:
        found["optimizers"] = [type(entry).__name__ for entry in optimizers]
        found["optimizers.defaults"] = optimizers[0].defaults
    for entry in dataclasses.fields(args):
        if entry.init and not entry.name.startswith(_IDLE):
            value = getattr(args, entry.name)
            found[entry.name] = getattr(value, "value", value)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


@contextlib.contextmanager
def own_patience(handler: Any) -> Iterator[None]:
    """Keep the patience that this run was given, where transformers restores callbacks with all they were made of."""
    given = [callback.early_stopping_patience for callback in _stopping(handler)]
    yield
    for callback, patience in zip(_stopping(handler), given, strict=True):
        callback.early_stopping_patience = patience


def _stopping(handler: Any) -> list[Any]:
    return [callback for callback in handler.callbacks if isinstance(callback, EarlyStoppingCallback)]


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """The terms that differ, each with what it was and what it is.

    How the rows of a step are divided over processes and micro-batches is no difference where their number is the same
    and that of the processes is not.
    """
    nothing = "not set"
    processes = [int(terms.get("processes", 1)) for terms in (saved, now)]
    idle = _DIVISION if processes[0] != processes[1] else ()
    found = {
        name: f"{name} was {short(saved.get(name, nothing))}, is {short(now.get(name, nothing))}"
        for name in sorted({*saved, *now} - set(idle))
        if saved.get(name, nothing) != now.get(name, nothing)
    }
    if "rows_per_step" in found and idle:
        found["rows_per_step"] += f"; {_fitting(int(saved['rows_per_step']), now, processes[1])}"
    return found


def _fitting(rows: int, now: Mapping[str, Any], processes: int) -> str:
    """Which settings give a step as many rows in so many processes."""
    each, left = divmod(rows, processes)
    if left or not each:
        return f"{processes} processes cannot share {rows} rows of a step evenly: start a number that divides them"
    asked = int(now.get("per_device_train_batch_size", 1))
    size = max(number for number in range(1, each + 1) if each % number == 0 and number <= max(asked, 1))
    return (
        f"with {processes} processes say per_device_train_batch_size {size} and gradient_accumulation_steps "
        f"{each // size}"
    )


def unlike(saved: Mapping[str, Any], now: Mapping[str, Any], override: Sequence[str]) -> str:
    """What keeps a run from going on from a checkpoint: every difference that was not asked for; empty for nothing.

    Args:
        saved, now: the terms of the checkpoint and of this run.
        override: terms that are meant to change.

    Raises:
        RequestError: an override of something that is no term.
    """
    unknown = [name for name in override if name not in now and name not in saved]
    if unknown:
        remedy = nearest(unknown[0], now)
        raise RequestError(message("nothing of that name to override", where=", ".join(unknown), remedy=remedy))
    lines = []
    for name, line in differences(saved, now).items():
        fixed = name.split(".")[0] in _FIXED
        if fixed or name not in override:
            lines.append(f"{line} (cannot change within a run)" if fixed else line)
    return "; ".join(lines)


def needed(accelerator: Any) -> list[str]:
    """The files without which training cannot go on as if nothing had been."""
    scaler = [SCALER] if getattr(accelerator, "scaler", None) is not None else []
    return [STATE, OPTIMIZER, SCHEDULER, RANDOM, *scaler]


def checkpoint(
    wanted: str | bool,
    run: Path,
    now: Mapping[str, Any],
    override: Sequence[str],
    fingerprint: Fingerprint,
    files: Sequence[str],
) -> Path:
    """The checkpoint to go on from: whole, of this run, with all that a run needs.

    Args:
        wanted: a checkpoint's folder, or True for the newest whole one in `run`.
        run: the output folder.
        now: this run's terms.
        override: terms that are meant to change.
        fingerprint: of the backbone at hand.
        files: what the checkpoint has to hold.

    Raises:
        FolderError: there is none, or it is damaged or lacks a file.
        BackboneError: another backbone.
        RequestError: another run's; with every difference.
    """

    def other(document: Mapping[str, Any]) -> str:
        return unlike(document["terms"], now, override)

    if wanted is True:
        folder, why = checkpoints.newest(run, other)
    else:
        folder = Path(str(wanted))
        why = other(checkpoints.verify(folder))
    lines = [why] if why else []
    try:
        manifest.refuse_other_backbone(manifest.read_manifest(folder), fingerprint, str(folder))
    except BackboneError as fault:
        if not lines:
            raise
        lines.append(str(fault))
    if lines:
        raise RequestError(
            message(
                "this is not the run that wrote the checkpoint",
                where=str(folder),
                found="; ".join(lines),
                remedy="Go on with the old values, or name what is meant to change: override=(...), --override NAME. "
                "For anything else load the checkpoint as an adapter and train it as a new run.",
            )
        )
    lacking = [name for name in files if not (folder / name).is_file()]
    if RANDOM in lacking and (folder / randomness.STATES).is_file():
        lacking.remove(RANDOM)
    if lacking:
        raise FolderError(
            message(
                "the checkpoint lacks what training needs to go on as if nothing had been",
                where=str(folder),
                expected=", ".join(lacking),
                remedy="Write checkpoints without save_only_model, or load this one as an adapter.",
            )
        )
    return folder


def agreed(*asked: Any) -> Path:
    """The checkpoint that all processes go on from: the first one chooses and verifies it.

    Args:
        asked: what `checkpoint` takes.

    Raises:
        AdaptersError: as `checkpoint` has it.
        FolderError: not every process sees it.
    """
    folder = Path(ranks.told(str(ranks.by_first(lambda: checkpoint(*asked)))))
    blind = [number for number, seen in enumerate(ranks.gathered(folder.is_dir())) if not seen]
    if blind:
        raise FolderError(
            message(
                "not every process sees the checkpoint",
                where=str(folder),
                found=f"nothing in process {', '.join(map(str, blind))}",
                remedy="Give an output folder that all machines of the run share.",
            )
        )
    return folder


def finished(folder: Path, override: Sequence[str]) -> bool:
    """Whether a checkpoint is a run's last one: transformers would train another step."""
    state = TrainerState.load_from_json(str(folder / STATE))
    if state.global_step >= state.max_steps:
        return not {"num_train_epochs", "max_steps"} & set(override)
    return "early_stopping_patience" not in override and any(map(_lost_patience, state.stateful_callbacks.values()))


def _lost_patience(kept: Any) -> bool:
    """Whether the state of a callback is that of early stopping which has stopped; others' stops end no run."""
    for entry in kept if isinstance(kept, list) else [kept]:
        count = entry.get("attributes", {}).get("early_stopping_patience_counter")
        if count is not None and count >= entry["args"]["early_stopping_patience"]:
            return True
    return False


def write_state(folder: Path, state: TrainerState, best: Mapping[str, torch.Tensor] | None) -> None:
    """Write a run's state into a checkpoint anew, and the best weights where they are no checkpoint of their own."""
    (folder / STATE).unlink()
    state.save_to_json(str(folder / STATE))
    if best is not None and state.best_model_checkpoint is None:
        (folder / manifest.BEST).mkdir()
        shards.save_tensors(folder / manifest.BEST / manifest.WEIGHTS, best, {"format": "pt"})


def write_moments(folder: Path, state: Mapping[str, Any], schedule: Any) -> None:
    """Write an optimizer's state, put together, and the schedule into a checkpoint, as one process writes its own."""
    torch.save(dict(state), folder / OPTIMIZER)
    torch.save(schedule.state_dict(), folder / SCHEDULER)


def best_weights(folder: Path) -> dict[str, torch.Tensor] | None:
    """The best weights that a run had when it wrote a checkpoint; None where it had not evaluated.

    Raises:
        FolderError: they are in another checkpoint, which is damaged or gone.
    """
    if (folder / manifest.BEST).is_dir():
        slots, _ = shards.read_header(folder / manifest.BEST / manifest.WEIGHTS)
        return {name: shards.read_tensor(slot) for name, slot in slots.items()}
    step = TrainerState.load_from_json(str(folder / STATE)).best_global_step
    if not step:
        return None
    best = folder.with_name(f"checkpoint-{step}")
    checkpoints.verify(best)
    return manifest.read_tensors(best, manifest.read_manifest(best))


def retune(
    take: Callable[[Any], None],
    optimizer: Any,
    schedule: Any,
    folder: Path,
    override: Sequence[str],
    args: TrainingArguments,
    steps: int,
) -> None:
    """Load an optimizer's moments and put this run's own rates, decay and schedule beside them.

    transformers restores the old rates with the moments, whatever the arguments say.

    Args:
        take: gives the optimizer its moments.
        optimizer, schedule: as this run made them, before the first step.
        folder: the checkpoint.
        override: terms that are meant to change.
        args: this run's.
        steps: optimizer steps behind us.

    Raises:
        RequestError: a schedule that follows a metric, whose past cannot be made up.
    """
    kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    changed = _SCHEDULE & set(override)
    if changed and kind in WATCHING:
        raise RequestError(
            message(
                "a schedule that follows a metric cannot change within a run",
                where=f"override: {', '.join(sorted(changed))}",
                found=kind,
                remedy="Load the checkpoint as an adapter and train it as a new run.",
            )
        )
    fresh = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    take(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
    if not override:
        schedule.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        return
    for group, values in zip(optimizer.param_groups, fresh, strict=True):
        group.update(values if changed else {name: value for name, value in values.items() if name != "lr"})
    if not changed:
        schedule.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch: "lr_scheduler.step() before optimizer.step()"
        for _ in range(steps):
            schedule.step()
