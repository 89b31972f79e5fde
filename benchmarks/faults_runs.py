"""Runs that are killed, and runs that go on from a checkpoint of which files are lost, empty, half-written or old."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.faults_outcomes import OTHER, SAID, SAME, SCRATCH, STUCK, UNSAID, Case, Found
from benchmarks.faults_sides import SIDES, Answer, Side, answer_of, answered, child, run, train

OFTEN = {"max_steps": 10, "save_steps": 1, "save_total_limit": 2}  # ends in the middle of an epoch
STATES = {"max_steps": 10, "save_steps": 4, "save_total_limit": 4}  # checkpoints of steps 4 and 8


def fresh(folder: Path) -> Path:
    """An absent folder."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def checkpoints(folder: Path) -> list[Path]:
    """What looks like a checkpoint, oldest first."""
    found = [entry for entry in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", entry.name)]
    return sorted(found, key=step)


def step(checkpoint: Path) -> int:
    """The step that a checkpoint's name tells."""
    return int(checkpoint.name.rpartition("-")[2])


def outcome(answer: Answer, reference: Answer, newest: int) -> str:
    """What came of a resume; `newest` is the step of the newest checkpoint."""
    if answer.fault:
        return STUCK
    if not answer.same(reference):
        return OTHER
    if answer.began == newest:
        return SAME
    return SAID if any(f"checkpoint-{newest}" in line for line in answer.said) else UNSAID


def words(answer: Answer) -> str:
    """The error, or from which step the run went on."""
    return answer.fault or f"went on from step {answer.began}"


# ---------------------------------------------------------------------- kills


def kills(name: str, count: int, place: Path) -> Iterator[Case]:
    """SIGKILLs spread at random over the whole of a run that saves after every step."""
    side, folder = SIDES[name], place / "run"
    draw = random.Random(0)
    shares = [(number + draw.random()) / count for number in range(count)]
    known: list[tuple[Answer, float, set[str]]] = []

    def reference() -> tuple[Answer, float, set[str]]:
        if not known:
            spans, answers = [], []
            for _ in range(3):
                begin, process = _started(side, fresh(folder))
                os.waitpid(process, 0)
                spans.append(time.monotonic() - begin)
                answers.append(run(side, fresh(folder), False, **OFTEN))
            if not all(answer.same(answers[0]) for answer in answers):
                raise RuntimeError(f"{name}: runs that nobody kills differ: {answers}")
            whole = {str(file.relative_to(checkpoints(folder)[-1])) for file in checkpoints(folder)[-1].rglob("*")}
            known.append((answers[0], median(spans), whole))
        return known[0]

    def act(share: float) -> Found:
        unkilled, span, whole = reference()
        while not _killed(side, fresh(folder), share * span):
            share *= 0.9  # it was faster this time
        there = checkpoints(folder)
        torn = bool(there) and not whole <= {str(file.relative_to(there[-1])) for file in there[-1].rglob("*")}
        inside = torn or any(folder.glob(".staging*"))
        answer = run(side, folder, bool(there), **OFTEN)
        if not there:
            found = SCRATCH if answer.same(unkilled) else STUCK if answer.fault else OTHER
        else:
            found = outcome(answer, unkilled, step(there[-1]))
        return Found(
            "killed inside a save" if inside else "killed between saves", 1, {found: 1}, {found: words(answer)}
        )

    for number, share in enumerate(shares, 1):
        yield Case("kills", name, f"kill {number} of {count}", partial(act, share))


def _started(side: Side, folder: Path) -> tuple[float, int]:
    """A run in a child, at the moment when its training begins."""
    ready, told = os.pipe()
    process = child(
        lambda: vars(answered(lambda: train(side, folder, False, lambda: _tell(told), **OFTEN))),
        folder.parent / "killed.json",
    )
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return time.monotonic(), process


def _tell(pipe: int) -> None:
    os.write(pipe, b".")


def _killed(side: Side, folder: Path, seconds: float) -> bool:
    """Kill a run so long after training began; whether it was still running."""
    begin, process = _started(side, folder)
    time.sleep(max(0.0, begin + seconds - time.monotonic()))
    os.kill(process, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
        return True
    ended = Answer.parse(answer_of(folder.parent / "killed.json"))
    if ended.fault:
        raise RuntimeError(f"{side.name}: a run fails before it is killed: {ended.fault}")
    return False


# ---------------------------------------------------------------------- states


def states(name: str, count: int | None, place: Path) -> Iterator[Case]:
    """Every lost, empty, half-written and outdated file of the newest of two checkpoints.

    Args:
        name: the side.
        count: how many of them, spread over all; None for all.
    """
    side, folder, kept = SIDES[name], place / "run", place / "kept"
    reference = run(side, fresh(folder), False, **STATES)
    fresh(kept)
    shutil.rmtree(checkpoints(folder)[-1])  # the run's last, after which there is nothing to go on with
    folder.rename(kept)
    every = list(_damages(kept))
    chosen = every if count is None else every[:: max(1, len(every) // count)][:count]

    def act(group: str, damage: Callable[[Path], None]) -> Found:
        shutil.copytree(kept, fresh(folder))
        damage(folder)
        newest = step(checkpoints(folder)[-1])
        answer = run(side, folder, True, **STATES)
        found = outcome(answer, reference, newest)
        return Found(group, 1, {found: 1}, {found: words(answer)})

    for group, title, damage in chosen:
        yield Case("states", name, f"{group}: {title}", partial(act, group, damage))


Damage = tuple[str, str, Callable[[Path], None]]


def _damages(kept: Path) -> Iterator[Damage]:
    """Group, name and deed of each state of the newest checkpoint, by the order in which its files were written."""
    older, newest = checkpoints(kept)
    order = sorted((f for f in newest.rglob("*") if f.is_file()), key=lambda f: (f.stat().st_mtime_ns, f.name))
    names = [str(file.relative_to(newest)) for file in order]
    for place, name in enumerate(names):
        for state in ("absent", "empty", "half"):
            yield "written up to here", f"{name} {state}", _edit(newest.name, name, state, names[place + 1 :])
            yield "this file alone", f"{name} {state}", _edit(newest.name, name, state, [])
        if (older / name).read_bytes() != (newest / name).read_bytes():
            yield "this file from an older step", name, _edit(newest.name, name, "old", [], older.name)
    yield "something else beside", "an empty checkpoint-99999", lambda run: (run / "checkpoint-99999").mkdir()
    yield "something else beside", "a copy named .bak", lambda run: _copy(run / newest.name, run / f"{newest.name}.bak")


def _copy(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def _edit(checkpoint: str, name: str, state: str, absent: list[str], older: str = "") -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        file = run / checkpoint / name
        for each in absent:
            (run / checkpoint / each).unlink()
        if state == "absent":
            file.unlink()
        elif state == "old":
            shutil.copyfile(run / older / name, file)
        else:
            content: Any = file.read_bytes()
            file.write_bytes(b"" if state == "empty" else content[: len(content) // 2])

    return edit
