"""Runs of two and three processes, one of which is killed at a random moment; then all are started again."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.faults_outcomes import CLEAR, HUNG, OTHER, QUIET, RAW, SCRATCH, STUCK, Case, Found
from benchmarks.faults_runs import OFTEN, checkpoints, fresh, outcome, step, words
from benchmarks.faults_sides import SIDES, Answer, Side, Unanswered, answer_of, answered, child, train

COUNTS = (2, 3)
WAIT = 20  # seconds that a process waits for the others, on both sides
PATIENCE = 60  # seconds until those that are left count as hung, and are killed


def ranks(name: str, count: int, place: Path) -> Iterator[Case]:
    """SIGKILLs of a random process at random moments of a run that saves after every step."""
    side, folder = SIDES[name], place / "run"
    draw = random.Random(0)
    chosen = [((n + draw.random()) / count, COUNTS[n % 2], draw.random()) for n in range(count)]
    known: dict[int, tuple[Answer, float]] = {}

    def reference(processes: int) -> tuple[Answer, float]:
        if processes not in known:
            begin, started = _started(side, fresh(folder), processes, resume=False)
            _waited(started)
            known[processes] = _answer(folder, 0), time.monotonic() - begin
            if known[processes][0].fault:
                raise RuntimeError(f"{name}: a run of {processes} fails unkilled: {known[processes][0].fault}")
        return known[processes]

    def act(share: float, processes: int, culprit: int) -> Found:
        unkilled, span = reference(processes)
        left = _killed(side, fresh(folder), processes, culprit, share * span)
        there = checkpoints(folder)
        _, started = _started(side, folder, processes, resume=bool(there))
        hung = _waited(started)
        answer = Answer(fault="hung") if hung else _answer(folder, 0)
        if not there:
            found = SCRATCH if answer.same(unkilled) else STUCK if answer.fault else OTHER
        else:
            found = outcome(answer, unkilled, step(there[-1]))
        group = f"one of {processes} processes killed"
        return Found(group, 1, {left[0]: 1, found: 1}, {left[0]: left[1], found: words(answer)})

    for number, (share, processes, at) in enumerate(chosen, 1):
        yield Case(
            "ranks", name, f"kill {number} of {count}", partial(act, share, processes, int(at * processes) % processes)
        )


def _started(side: Side, folder: Path, processes: int, *, resume: bool) -> tuple[float, dict[int, int]]:
    """The processes of a run by their rank, at the moment when the training of the first one begins."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ready, told = os.pipe()
    started = {
        rank: child(
            partial(_part, side, folder, resume, rank, processes, port, told), folder.parent / f"rank{rank}.json", 120
        )
        for rank in range(processes)
    }
    os.close(told)
    os.read(ready, 1)
    os.close(ready)
    return time.monotonic(), started


def _part(side: Side, folder: Path, resume: bool, rank: int, processes: int, port: int, told: int) -> dict[str, object]:
    """What one process of a run does."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):  # the parent's, a run of one
        state._reset_state()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["ACCELERATE_USE_CPU"] = "true"

    def tell() -> None:
        if rank == 0:
            os.write(told, b".")

    return vars(answered(lambda: train(side, folder, resume, tell, ddp_timeout=WAIT, **OFTEN)))


def _waited(started: dict[int, int]) -> list[int]:
    """Wait for processes; those that hung were killed, as their launcher does."""
    left, hung = dict(started), []
    deadline = time.monotonic() + PATIENCE
    while left:
        for rank, number in list(left.items()):
            if os.waitpid(number, os.WNOHANG)[0]:
                del left[rank]
        if left and time.monotonic() > deadline:
            hung = sorted(left)
            for number in left.values():
                os.kill(number, signal.SIGKILL)
                os.waitpid(number, 0)
            left = {}
        time.sleep(0.01)
    return hung


def _killed(side: Side, folder: Path, processes: int, culprit: int, seconds: float) -> tuple[str, str]:
    """Kill one process so long after training began; what the others ended with."""
    begin, started = _started(side, folder, processes, resume=False)
    time.sleep(max(0.0, begin + seconds - time.monotonic()))
    os.kill(started[culprit], signal.SIGKILL)
    hung = _waited(started)
    if hung:
        return HUNG, f"ranks {hung} after {PATIENCE} s"
    for rank in range(processes):
        if rank != culprit:
            answer = _answer(folder, rank)
            if answer.fault:
                return (CLEAR if answer.clear else RAW), answer.fault
    return QUIET, "they had ended"


def _answer(folder: Path, rank: int) -> Answer:
    try:
        return Answer.parse(answer_of(folder.parent / f"rank{rank}.json"))
    except Unanswered as fault:
        return Answer(fault=str(fault)[-300:])
