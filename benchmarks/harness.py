"""Runs of a benchmark: each in a process of its own, kept as lines of JSON, with what it took and where it ran.

Only the standard library is imported at the top: parents must stay small, because Linux hands a parent's peak memory
on to its children.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import transformers

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benchmarks" / ".cache"
PACKAGES = {"holdfast": "adapters", **{name: name for name in ("torch", "transformers", "peft", "bitsandbytes")}}
T = TypeVar("T")


class ChildError(RuntimeError):
    """A run failed; the message ends with what it said last."""


class OutOfTime(ChildError):
    """A run took longer than it may."""


# ---------------------------------------------------------------------- processes


def in_child(
    module: str, request: Mapping[str, Any], *, limit: float | None = None, environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Answer a request in a fresh process of a module that calls `serve`.

    Args:
        module: of the child.
        request: plain data.
        limit: seconds after which the child is ended.
        environment: variables on top of this process's own.

    Raises:
        ChildError: the process failed.
        OutOfTime: it was ended.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, name],
                cwd=ROOT,
                # A look-up would be a different run.
                env={**os.environ, "HF_HUB_OFFLINE": "1", **(environment or {})},
                capture_output=True,
                text=True,
                check=False,
                timeout=limit,
            )
        except subprocess.TimeoutExpired as fault:
            raise OutOfTime(f"the child was ended after {limit:.0f} s") from fault
        if done.returncode != 0:
            last = "\n".join(done.stderr.strip().splitlines()[-12:])
            raise ChildError(f"the child ended with {done.returncode}; the last it said:\n{last}")
        answer: dict[str, Any] = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
        return answer


def serve(act: Callable[[dict[str, Any], Path], dict[str, Any]]) -> None:
    """The child's side: a request in, an answer out; what the libraries print stays out of it."""
    folder = Path(sys.argv[1])
    reply = act(json.loads((folder / "request.json").read_text(encoding="utf-8")), folder)
    (folder / "answer.json").write_text(json.dumps(reply), encoding="utf-8")


# ---------------------------------------------------------------------- the results file


def read(file: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """Everything measured so far, oldest first.

    Raises:
        SystemExit: a line that is no result of this benchmark.
    """
    results = []
    if file.is_file():
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            try:
                results.append(parse(json.loads(line)))
            except (ValueError, TypeError, KeyError) as fault:
                raise SystemExit(f"not a result ({file}, line {number}): {fault}. Remove the line.") from fault
    return results


def append(result: Mapping[str, Any], file: Path) -> None:
    """Add a line, on disk when this returns."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(result) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


# ---------------------------------------------------------------------- what a run takes, and where it runs


@dataclass(frozen=True)
class Took:
    """What something took, and what tells whether the machine was quiet."""

    seconds: float
    others_cores: float | None  # cores that everything else kept busy meanwhile; None where the system does not tell
    cpu_seconds: float = 0.0  # of this process, all its threads


class Clock:
    """Wall and processor seconds while it runs.

    Two busy threads beside another program can take ten times as long, hence an eye on what else runs.
    """

    def __init__(self) -> None:
        self._spent = [0.0, 0.0, 0.0]
        self._began: list[float] | None = None
        self._tells = busy_seconds() is not None

    def _since(self) -> list[float]:
        now = _now()
        return [] if self._began is None else [after - before for after, before in zip(now, self._began, strict=True)]

    @contextlib.contextmanager
    def running(self) -> Iterator[Clock]:
        """Seconds count within."""
        self._began = _now()
        try:
            yield self
        finally:
            self._stop()

    def _stop(self) -> None:
        self._spent = [sum(pair) for pair in zip(self._spent, self._since(), strict=True)]
        self._began = None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Seconds within, inside of `running`, do not count."""
        self._stop()
        try:
            yield
        finally:
            self._began = _now()

    @property
    def took(self) -> Took:
        """So far."""
        parts = zip(self._spent, self._since() or [0.0] * 3, strict=True)
        seconds, own, everyone = (sum(pair) for pair in parts)
        others = max(0.0, everyone - own) / seconds if self._tells and seconds else None
        return Took(round(seconds, 3), None if others is None else round(others, 2), round(own, 3))


def _now() -> list[float]:
    return [time.monotonic(), time.process_time(), busy_seconds() or 0.0]


def timed(trainer: transformers.Trainer) -> Took:
    """Train by the clock."""
    clock = Clock()
    with clock.running():
        trainer.train()
    return clock.took


def busy_seconds() -> float | None:
    """Processor seconds that the whole machine has spent on work so far (Linux; time stolen by the host is work)."""
    listing = Path("/proc/stat")
    if not listing.is_file():
        return None
    user, nice, system, _idle, _waiting, *rest = map(int, listing.read_text(encoding="ascii").split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """Processor seconds of all processes that this one has started and seen the end of, and of theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def peak_memory() -> int:
    """Bytes of resident memory at this process's peak; kilobytes on Linux, bytes on macOS."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine(device: str) -> str:
    """The processor's name, its cores, torch's threads, and the device where it is another one."""
    import torch

    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    elsewhere = "" if device == "cpu" else f", trained on {device} ({torch.cuda.get_device_name(device)})"
    return f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads{elsewhere}"


def versions() -> str:
    """Python and the packages that matter here."""
    found = [f"{name} {import_module(module).__version__}" for name, module in PACKAGES.items() if find_spec(module)]
    return ", ".join([f"Python {platform.python_version()}", *found])


# ---------------------------------------------------------------------- words


def rate(value: float | None) -> str:
    """A learning rate as people write it: 1e-4."""
    if value is None:
        return "the best"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, and smallest and largest where they differ; a dash where nothing is known."""
    if not values:
        return "-"
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), mean(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def say(line: str) -> None:
    """Progress goes to stderr: what stdout holds can be pasted."""
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """A whole number above 0, for the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def row_names(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Names of rows, divided by commas, for the command line."""

    def parsed(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown row {unknown[0]!r}; known: {', '.join(known)}")
        return names

    return parsed
