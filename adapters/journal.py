"""A run's journal, metrics.jsonl: one JSON line an event, written as the run goes.

A line is handed to the system whole, so that a run that is killed leaves whole lines; what a power cut leaves of the
last one is taken off before the run goes on, and never read. Nothing in it is a row of the data.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from adapters import jsontext
from adapters.errors import FolderError, message

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"
LARGEST = 256 << 20  # bytes of a journal that is read
Event = dict[str, Any]


def plain(value: Any) -> Any:
    """A value as JSON holds it; numbers that are not finite are null, which JSON has a word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # half a surrogate pair is no character
    if value is None or isinstance(value, bool | int):
        return value
    item = getattr(value, "item", None)  # numbers of numpy and torch
    return plain(item()) if callable(item) else str(value)


def memory() -> dict[str, int]:
    """Bytes that this process holds, and the most that it has held; on a GPU the most of its memory too."""
    import sys

    import psutil

    found = {"memory": int(psutil.Process().memory_info().rss)}
    try:
        import resource
    except ImportError:  # not on Windows
        return found
    unit = 1 if sys.platform == "darwin" else 1024
    found["peak_memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        found["peak_gpu_memory"] = int(torch.cuda.max_memory_allocated())
    return found


@final
class Journal:
    """The file of a run; nothing is written before the first event.

    Every event has "event" (its kind), "time" (UTC) and "seconds" since the run began, those before a resume counted.
    A journal that cannot be written is said once, and the run goes on: it is not worth a run.

    Args:
        file: where it stands; its folder is made.
        silent: write nothing: another process of the run writes its journal.
    """

    def __init__(self, file: Path | str, *, silent: bool = False) -> None:
        self.file = Path(file)
        self._begun = False
        self._broken = silent
        self._began = time.monotonic()

    def begin(self, **facts: Any) -> None:
        """A new run: what a file of this name held of an earlier one stays, and is not this run's."""
        self._began = time.monotonic()
        self.write("begin", **facts)

    def resume(self) -> None:
        """Go on with the run that the file holds: its seconds count on."""
        with contextlib.suppress(FolderError):
            before = [number(event, "seconds") or 0.0 for event in read(self.file)]
            self._began = time.monotonic() - max(before, default=0.0)

    def resumed(self, step: int) -> None:
        """The run goes on from a checkpoint: what was written of later steps is about to be done again."""
        self.write("resumed", step=step)

    def write(self, event: str, **facts: Any) -> None:
        """One line, handed to the system before this returns."""
        if self._broken:
            return
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        document = {"event": event, "time": moment, "seconds": round(time.monotonic() - self._began, 3), **facts}
        line = json.dumps(plain(document), ensure_ascii=True, allow_nan=False).encode() + b"\n"
        try:
            if not self._begun:
                self.file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if not self._begun:
                    _mend(handle)
                self._begun = True
                if (written := os.write(handle, line)) != len(line):
                    raise OSError(f"{written} of {len(line)} bytes written")
                if event == "end":
                    os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as fault:
            self._broken = True
            logger.warning("the journal %s cannot be written: %s; the run goes on without it", self.file, fault)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the run: its seconds and memory are written when it is over, whether or not it went well."""
        began = time.monotonic()
        whole = False
        try:
            yield
            whole = True
        finally:
            took = round(time.monotonic() - began, 3)
            self.write("phase", name=name, took=took, **({} if whole else {"whole": False}), **memory())


def _mend(handle: int) -> None:
    """Take off the end of a file that is no whole line."""
    size = os.fstat(handle).st_size
    if size == 0 or os.pread(handle, 1, size - 1) == b"\n":
        return
    end, step = size, 1 << 16
    while end:
        begin = max(0, end - step)
        place = os.pread(handle, end - begin, begin).rfind(b"\n")
        if place >= 0:
            os.ftruncate(handle, begin + place + 1)
            return
        end = begin
    os.ftruncate(handle, 0)


def number(event: Mapping[str, Any], name: str) -> float | None:
    """A number of an event; None where it has none, or something else under that name."""
    value = event.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def read(file: Path) -> list[Event]:
    """The events of the last run in a journal, steps that were done again after a resume told once.

    What follows the last line break is left out: it is a line that is being written, or never was.

    Raises:
        FolderError: no such file, too large, or a line that is no event.
    """
    if not file.is_file():
        raise FolderError(message("there is no journal", where=str(file)))
    if file.stat().st_size > LARGEST:
        raise FolderError(message("a file too large to be a journal", where=str(file), remedy="Delete it."))
    found: list[Event] = []
    for place, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
        try:
            event = jsontext.parse(line)
        except ValueError as fault:
            raise FolderError(message("not a line of a journal", where=f"{file}, line {place}", found=fault)) from fault
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            raise FolderError(message("not a line of a journal", where=f"{file}, line {place}", expected='"event"'))
        if event["event"] == "begin":
            found = []
        elif event["event"] == "resumed":
            last = number(event, "step") or 0.0
            found = [entry for entry in found if not _later(entry, last)]
        found.append(event)
    return found


def _later(event: Mapping[str, Any], step: float) -> bool:
    """Whether an event tells of a step after another; those that tell of none do not."""
    return event["event"] in ("step", "evaluation") and (number(event, "step") or 0.0) > step
