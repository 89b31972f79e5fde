"""What goes wrong in one process of a run, and how all of them end: each as the others, nobody waiting."""

from __future__ import annotations

import functools
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lockstep
import torch
from lockstep import Case
from transformers import TrainerCallback

import adapters
from adapters import ranks
from adapters.predict import measure


class At(TrainerCallback):
    """Does something in one process when a step begins."""

    def __init__(self, step: int, rank: int, act: Callable[[], None]) -> None:
        self.step, self.rank, self.act = step, rank, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1 and ranks.rank() == self.rank:
            self.act()


def ending(act: Callable[[], Any]) -> list[str]:
    """How something ends: the kind of the exception, and its words."""
    try:
        act()
    except BaseException as fault:
        return [type(fault).__name__, str(fault)]
    return ["", ""]


def made(folder: str, name: str, case: Case | None = None, batch: int = 3, **others: Any) -> adapters.Trainer:
    """A run of three steps an epoch, saved at each; every process names a folder of its own."""
    case = case or Case(args={"save_strategy": "steps", "save_steps": 1})
    return lockstep.trainer(Path(folder) / f"{name}{ranks.rank()}", case, batch, **others)


def spoilt(folder: str) -> dict[str, Any]:
    """A number that is not finite, in the rows of the last process."""
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    trainer = made(folder, "spoilt")
    layer = trainer.adapted.model.bert.encoder.layer[1]

    def spoil() -> None:
        layer.register_forward_hook(lambda _module, _inputs, output: output * float("nan"))

    trainer.add_callback(At(2, last, spoil))
    before = {name: tensor.clone() for name, tensor in trainer.adapted.state().items()}
    said = ending(trainer.train)
    fine = all(bool(torch.isfinite(tensor).all()) for tensor in trainer.adapted.state().values())
    return {"said": said, "finite": fine, "names": sorted(before)}


def parted(folder: str) -> dict[str, Any]:
    """A trained tensor that one process changes, and a frozen one."""
    trainer = made(folder, "parted")
    name = trainer.adapted.trained[0]
    tensor = dict(trainer.adapted.model.named_parameters())[name]

    def move() -> None:
        with torch.no_grad():
            tensor.view(-1)[0] += 1e-3

    trainer.add_callback(At(2, 1, move))
    trained = ending(trainer.train)
    key = next(key for key, value, _ in trainer.adapted.places() if value.data_ptr() == tensor.data_ptr())

    trainer = made(folder, "thawed")
    frozen = trainer.adapted.model.bert.embeddings.word_embeddings.weight

    def thaw() -> None:
        with torch.no_grad():
            frozen.view(-1)[0] += 1e-3

    trainer.add_callback(At(2, 1, thaw))
    return {"trained": trained, "name": key, "frozen": ending(trainer.train)}


def others(folder: str) -> dict[str, Any]:
    """Processes that were started with something else: a seed, rows, a strategy, a backbone."""
    odd = ranks.rank() == 1
    found = {
        "seed": ending(made(folder, "seed", Case(args={"seed": 7 + odd})).train),
        "rows": ending(lambda: made(folder, "rows", Case(rows=13 - odd)).train()),
        "strategy": ending(made(folder, "strategy", Case(strategy="bitfit" if odd else "lora")).train),
    }
    trainer = made(folder, "weights")
    with torch.no_grad():
        next(value for _, value, _ in trainer.adapted.places()).add_(float(odd))
    return {**found, "weights": ending(trainer.train)}


def told_to_stop(folder: str, number: int) -> dict[str, Any]:
    """A signal that one process is sent; then the run goes on."""
    case = Case(args={"save_strategy": "no"})
    place = Path(folder) / f"stopped{number}"

    def one(name: Path, *callbacks: Any) -> adapters.Trainer:
        found = lockstep.trainer(name, case, 3, held=None)
        for callback in callbacks:
            found.add_callback(callback)
        return found

    trainer = one(place, At(2, 1, lambda: os.kill(os.getpid(), number)))
    said = ending(trainer.train)
    steps = trainer.state.global_step
    ranks.wait()
    there = sorted(entry.name for entry in place.iterdir())
    again = one(place)
    again.train(resume_from_checkpoint=True)
    whole = one(Path(folder) / f"whole{number}")
    whole.train()
    same = all(torch.equal(again.adapted.state()[name], tensor) for name, tensor in whole.adapted.state().items())
    return {"said": said, "steps": steps, "there": there, "same": same}


def full_disk(folder: str) -> dict[str, Any]:
    """The process that writes finds no room: a limit on the size of files, which the system holds it to."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = made(folder, "full")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))

    trainer.add_callback(At(2, 0, limit))
    try:
        said = ending(trainer.train)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    left = {place.name: sorted(entry.name for entry in place.iterdir()) for place in Path(folder).glob("full*")}
    return {"said": said, "left": left}


def unreadable(folder: str) -> dict[str, Any]:
    """Rows that one process cannot read, in the midst of an epoch."""
    trainer = made(folder, "unreadable")
    plain, calls = trainer.data_collator, iter(range(99))

    def collate(rows: Any, **more: Any) -> Any:
        if ranks.rank() == 1 and next(calls) == 1:
            raise adapters.DataError("the picture cannot be read (row 5)")
        return plain(rows, **more)

    trainer.data_collator = collate
    return {"said": ending(trainer.train)}


class NotOurs(Exception):
    """An error of a caller's own."""


def unmeasured(folder: str) -> dict[str, Any]:
    """An evaluation that one process cannot finish: in a pass, a batch, the metrics; by errors of ours and others."""
    raised: dict[str, Callable[[], Exception]] = {
        "ours": lambda: adapters.DataError("the picture cannot be read (row 3)"),
        "not ours": lambda: NotOurs("the metric is out of reach"),
    }
    found: dict[str, Any] = {}

    def at_fault(kind: str, after: int, act: Any) -> Any:
        """The same act, but for the second process, which it fails in after some times."""
        calls = iter(range(99))

        def outer(*args: Any, **more: Any) -> Any:
            if ranks.rank() == 1 and next(calls) == after:
                raise raised[kind]()
            return act(*args, **more)

        return outer

    for kind in raised:
        for when, after in (("first", 0), ("last", 2)):
            trainer = made(folder, f"pass {kind} {when}", batch=6)
            trainer.args.per_device_eval_batch_size = 1
            trainer.prediction_step = at_fault(kind, after, trainer.prediction_step)
            found[f"pass, {kind}, {when}"] = ending(trainer.evaluate)
        trainer = made(folder, f"batch {kind}", batch=6)
        trainer.args.per_device_eval_batch_size = 1
        trainer.data_collator = at_fault(kind, 1, trainer.data_collator)
        found[f"batch, {kind}"] = ending(trainer.evaluate)
        trainer = made(folder, f"metrics {kind}", batch=6, compute_metrics=at_fault(kind, 0, lambda found: {"x": 1.0}))
        found[f"metrics, {kind}"] = ending(trainer.evaluate)
        trainer = made(folder, f"run {kind}", batch=3)
        trainer.prediction_step = at_fault(kind, 0, trainer.prediction_step)
        found[f"run, {kind}"] = ending(trainer.train)
        rows = trainer.prepared(lockstep.uneven("text-classification", 8, seed=1))
        kind_of = type(trainer.adapted.task)
        inner = kind_of.measured
        try:
            kind_of.measured = at_fault(kind, 1, inner)
            measured = ending(functools.partial(measure, trainer.adapted, rows, batch_size=2, together=True))
        finally:
            kind_of.measured = inner
        found[f"measure, {kind}"] = measured
        found[f"afterwards, {kind}"] = trainer.evaluate()["eval_accuracy"]  # the processes are in step still
    return found


def short_of_memory(folder: str) -> dict[str, Any]:
    """Memory that runs out in one process at more than one row."""
    found = {}
    for name in ("short", "ample"):
        rows, accumulation = (3, 1) if name == "short" else (1, 3)
        trainer = made(folder, name, Case(args={"save_strategy": "no"}), rows, accumulation=accumulation)
        if name == "short":

            def run_out(_module: Any, inputs: Any) -> None:
                if torch.is_grad_enabled() and len(inputs[0]) > 1:
                    raise torch.OutOfMemoryError("CUDA out of memory")

            if ranks.rank() == 1:
                trainer.adapted.model.bert.encoder.layer[2].register_forward_pre_hook(run_out)
        trainer.train()
        found[name] = lockstep.told(trainer)
    return found


def dropped(folder: str) -> dict[str, Any]:
    """What dropout leaves out in each process, and the checkpoints' bits with it."""
    args = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "frozen_dropout": True}
    case = Case(options={"lora_dropout": 0.3}, args=args)
    masks: list[Any] = []

    def run(name: str, resume: bool = False) -> adapters.Trainer:
        trainer = lockstep.trainer(Path(folder) / name, case, 3, noisy=True)
        for module in trainer.adapted.model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p == 0.3:
                module.register_forward_hook(lambda _m, _i, output: masks.append((output == 0).flatten().tolist()))
                break
        trainer.train(resume_from_checkpoint=str(Path(folder) / "whole" / "checkpoint-4") if resume else None)
        return trainer

    whole = run("whole")
    mine = masks[0]
    said = ranks.gathered(mine)
    again = run("again", resume=True)
    log = [entry for entry in lockstep.told(whole)["log"] if "loss" in entry]
    logged = [entry for entry in lockstep.told(again)["log"] if "loss" in entry]
    same = all(torch.equal(again.adapted.state()[name], tensor) for name, tensor in whole.adapted.state().items())
    return {"masks": said, "same": same and log == logged}


def answered(folder: str) -> dict[str, Any]:
    """What a caller's own metrics get, and what `predict` gives: every row once, in the order of the rows."""
    seen: list[Any] = []

    def metrics(found: Any) -> dict[str, float]:
        seen.append([found.predictions.round(5).tolist(), found.label_ids.tolist()])
        return {"rows": float(len(found.label_ids))}

    trainer = lockstep.trainer(Path(folder) / "answered", Case(), 6, compute_metrics=metrics)
    rows = trainer.prepared(lockstep.uneven("text-classification", 5, seed=1))
    numbers = trainer.evaluate()
    found = trainer.predict(rows)
    trainer = lockstep.trainer(Path(folder) / "answered", Case(), 6)
    measured = trainer.evaluate()
    timed = ("_runtime", "_per_second", "_time")
    return {
        "seen": seen,
        "predicted": found.predictions.round(5).tolist(),
        "labels": found.label_ids.tolist(),
        "rows": numbers["eval_rows"],
        "loss": numbers["eval_loss"],
        "measured": {name: value for name, value in measured.items() if not name.endswith(timed)},
    }


def all_of(folder: str) -> dict[str, Any]:
    """Every fault in turn; the group of processes outlives them all."""
    ranks.join()
    acts = (spoilt, parted, others, full_disk, unreadable, unmeasured, short_of_memory, dropped, answered)
    found = {act.__name__: act(folder) for act in acts}
    for number in (signal.SIGINT, signal.SIGTERM):
        found[f"told_to_stop{int(number)}"] = told_to_stop(folder, int(number))
    left = sorted(str(place.relative_to(folder)) for place in Path(folder).glob("*1/**/*"))
    return {**found, "written": left}
