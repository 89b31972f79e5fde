"""The k-th change of the disk fails, for every k: of a checkpoint's save, and of a save over a good adapter folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from benchmarks.faults_outcomes import CLEAR, KILLED, LOST, OTHER, QUIET, RAW, WHOLE, Case, Found
from benchmarks.faults_runs import checkpoints, fresh, outcome, step, words
from benchmarks.faults_sides import (
    SIDES,
    Answer,
    Side,
    Unanswered,
    answer_of,
    answered,
    child,
    digest,
    in_child,
    run,
    told,
    train,
)
from benchmarks.faults_trace import CHANGES, GROWS, WRITES, Fault, watch, watched

MODES = {
    "ENOSPC": "ENOSPC once",
    "EIO": "EIO once",
    "short": "half a write, the caller is told",
    "full": "half a write, then a full disk",
    "kill": "SIGKILL just before it",
}
# Goes on from step 1, writes 2, then deletes 1; the run ends with an epoch.
RUN = {"max_steps": 2, "save_steps": 1, "save_total_limit": 1, "per_device_train_batch_size": 12}


def planned(seen: list[str]) -> list[tuple[int, str]]:
    """Each call of a save with each fate that can befall it, and one call more than there are: none fails."""
    fates = {"short": WRITES, "full": GROWS}
    return [
        (number, mode)
        for number, call in enumerate([*seen, "none"], 1)
        for mode in MODES
        if mode not in fates or call in fates[mode]
    ]


def under(fault: Fault, act: Callable[[], Answer], place: Path) -> Answer | None:
    """The answer of an act whose changes of the disk meet a fault; None where it did not live to give one."""
    file = place / "fault.json"

    def watched_act() -> dict[str, object]:
        watched(CHANGES)
        return vars(answered(act))

    watch(child(watched_act, file), fault)
    try:
        return Answer.parse(answer_of(file))
    except Unanswered:
        if fault.mode != "kill":
            raise
        return None


def writes(name: str, count: int | None, place: Path) -> Iterator[Case]:
    """Every change of the disk in a save, failing in each way.

    Args:
        name: the side.
        count: how many of them, spread over all; None for all.
    """
    side = SIDES[name]
    every = [*_checkpoint_cases(side, name, place), *_folder_cases(side, name, place)]
    yield from every if count is None else every[:: max(1, len(every) // count)][:count]


# ---------------------------------------------------------------------- a checkpoint


def _checkpoint_cases(side: Side, name: str, place: Path) -> list[Case]:
    folder, kept = place / "run", place / "kept"
    reference = run(side, fresh(folder), False, **{**RUN, "save_total_limit": 2})
    shutil.rmtree(checkpoints(folder)[-1])
    fresh(kept)
    folder.rename(kept)

    def again(number: int, mode: str) -> tuple[Answer | None, Fault]:
        shutil.copytree(kept, fresh(folder))
        fault = Fault(folder, number, mode)
        return under(fault, lambda: train(side, folder, True, **RUN), place), fault

    calls = again(0, "")[1].seen

    def act(number: int, mode: str) -> Found:
        answer, fault = again(number, mode)
        if answer is not None and not answer.fault and not answer.same(reference):
            return _found("a checkpoint", mode, answer, OTHER, fault.hit)
        there = checkpoints(folder)
        then = run(side, folder, True, **RUN)
        came = outcome(then, reference, step(there[-1]) if there else -1)
        return _found("a checkpoint", mode, answer, came, f"{fault.hit}; then: {words(then)}")

    return [
        Case("writes", name, f"checkpoint, change {number} of {len(calls)} {mode}", partial(act, number, mode))
        for number, mode in planned(calls)
    ]


def _found(what: str, mode: str, answer: Answer | None, came: str, tale: str) -> Found:
    """What the process under the fault said, and what came after it."""
    said = KILLED if answer is None else QUIET if not answer.fault else CLEAR if answer.clear else RAW
    error = answer.fault if answer is not None else ""
    return Found(f"{what}: {MODES[mode]}", 1, {said: 1, came: 1}, {said: f"{tale.split(';')[0]}: {error}", came: tale})


# ---------------------------------------------------------------------- an adapter folder


def _folder_cases(side: Side, name: str, place: Path) -> list[Case]:
    folder, kept = place / "saved" / "adapter", place / "kept-adapter"
    folder.parent.mkdir(exist_ok=True)

    def first() -> str:
        adapted = side.adapted()
        side.save(adapted, fresh(kept))
        return digest(side.state(adapted))

    def second() -> Answer:
        adapted = side.adapted()
        with torch.no_grad():
            for parameter in side.module(adapted).parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5)
        weights = digest(side.state(adapted))
        side.save(adapted, folder)
        return Answer(weights=weights)

    def loaded() -> str:
        try:
            return digest(side.state(side.load(folder)))
        except Exception as fault:
            return told(fault)

    old = in_child(first, place)

    def again(number: int, mode: str) -> tuple[Answer | None, Fault]:
        shutil.copytree(kept, fresh(folder))
        fault = Fault(folder.parent, number, mode)
        return under(fault, second, place), fault

    clean, counted = again(0, "")
    new = clean.weights if clean is not None else ""

    def act(number: int, mode: str) -> Found:
        answer, fault = again(number, mode)
        there = in_child(loaded, place)
        came = WHOLE if there in (old, new) else LOST
        if answer is not None and not answer.fault and there != new:
            came = OTHER
        return _found("an adapter folder", mode, answer, came, f"{fault.hit}; then: {there}")

    return [
        Case("writes", name, f"folder, change {number} of {len(counted.seen)} {mode}", partial(act, number, mode))
        for number, mode in planned(counted.seen)
    ]
