"""Where each process of a run is, told through the store in which the processes met; who fell silent, and whose fault.

A process that waits for others in a collective learns from torch that it waited in vain, not for whom. So each writes
beside it, into the store, where it is and that it lives, and what stopped it; whoever waits in vain reads what the
others wrote. A thread writes and listens, so that a process speaks while it computes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

from adapters.errors import RankError, message

BEAT = 0.5  # seconds from one sign of life to the next
LISTENING = 5.0  # seconds that the store has to answer a question
GRACE = 15.0  # seconds from another's fault until a process that cannot hear it is ended
LINGER = 5.0  # seconds that the process with the store in it stays for the others to read its fault
REMEDY = (
    "Look at the last that process said, and whether the system ended it (out of memory). Start the run again with the "
    "same command and --resume (resume_from_checkpoint=True): it goes on from the newest whole checkpoint. Where a "
    "process was only slow, give a greater ddp_timeout."
)
_LOST = re.compile(r"gloo|nccl|closed by peer|reset by peer|broken pipe|timed out|timeout", re.IGNORECASE)


def is_loss(fault: BaseException) -> bool:
    """Whether an error is torch's word for another process that is gone or late."""
    from torch.distributed import DistError

    return isinstance(fault, DistError) or (type(fault) is RuntimeError and _LOST.search(str(fault)) is not None)


@dataclass(frozen=True)
class Sign:
    """The last that a process wrote of itself."""

    beat: int
    calls: int  # how many collectives of ours it has come to
    step: int
    place: str
    at: float  # seconds of its clock
    fault: tuple[str, str] | None = None  # class and words of what stopped it
    ended: bool = False

    @classmethod
    def parse(cls, text: bytes) -> Sign:
        """From what lies in the store."""
        found: dict[str, Any] = json.loads(text)
        fault = found.pop("fault")
        return cls(**found, fault=tuple(fault) if fault else None)

    def seen(self) -> str:
        """When and where it was."""
        return f"last heard of {max(0.0, time.time() - self.at):.1f} s ago at {self.place}"


@final
class Presence:
    """One process among those of a run.

    Args:
        store: where the processes met: a `torch.distributed.Store`; two connections of its own are opened.
        word: tells this run from others that used the store, the same in all processes.
        rank, count: which of how many processes this is.
        host: the process with the store in it; None where the launcher keeps it.
    """

    def __init__(self, store: Any, word: str, rank: int, count: int, host: int | None) -> None:
        self.rank, self.count, self.host = rank, count, host
        self._writer, self._reader = store.clone(), store.clone()
        self._keys = [f"holdfast/{word}/{number}" for number in range(count)]
        self._alarm = f"holdfast/{word}/alarm"
        self._calls = self._step = self._beat = 0
        self._place = "its beginning"
        self._fault: tuple[str, str] | None = None
        self._ended = False
        self._heard: dict[int, tuple[str, str]] = {}
        self._since: float | None = None  # when a fault was heard
        self._known: list[Sign | None] = [None] * count
        self._inside = 0
        self._writing, self._asking = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._live, name="presence", daemon=True)

    @property
    def inside(self) -> bool:
        """Whether this process is at the common work."""
        return self._inside > 0

    def begin(self) -> None:
        """Speak and listen from now on; all have written once by then."""
        self._thread.start()

    def close(self) -> None:
        """Speak and listen no more."""
        self._closed.set()

    # ------------------------------------------------------------------ what this process says

    def at(self, place: str, step: int | None = None) -> None:
        """Tell where this process is.

        Args:
            place: in words, "step 3".
            step: the training step, where it begins one.

        Raises:
            RankError: another process has failed meanwhile.
        """
        self._place, self._step = place, self._step if step is None else step
        self._write()
        self.check()

    def arrive(self) -> None:
        """Tell that this process has come to a collective.

        Raises:
            RankError: another process has failed meanwhile.
        """
        self._calls += 1
        self._write()
        self.check()

    def enter(self) -> None:
        """From here on this process does its part of the common work."""
        self._inside += 1
        self._ended = False

    def leave(self, fault: BaseException | None) -> None:
        """It does so no more; what stops it stops the others, which hear it.

        Args:
            fault: what stopped it, None for nothing.
        """
        self._inside -= 1
        if fault is None:
            self._ended = not self._inside
            self._write()
            return
        if self._fault is None:
            words = str(fault) or "; ".join(getattr(fault, "__notes__", ()))
            self._fault = type(fault).__name__, words[:2000]
            self._write(alarm=True)
            if self.host == self.rank:
                self._linger()

    def check(self) -> None:
        """Stop where another process has failed.

        Raises:
            RankError: with its words.
        """
        if self._heard and self._inside and self._fault is None:
            raise self._of_heard()

    # ------------------------------------------------------------------ what the others said

    def explained(self, fault: BaseException) -> RankError:
        """A collective that failed, as the error that says for whom this process waited.

        Args:
            fault: what torch raised.
        """
        line = " ".join(str(fault).split())
        raw = f"torch says: {line[:160]}"
        signs = self._look()
        if signs is None:
            if self.host is None:
                return RankError(message("the launcher's store does not answer", where=self._place, found=raw))
            lost = {self.host: self._known[self.host]}
            return self._silent(lost, raw)
        alive, now = signs
        told = {n: sign.fault for n, sign in enumerate(now) if sign.fault and n != self.rank}
        own = {n: words for n, words in told.items() if words[0] != RankError.__name__}
        if own:
            return self._failed(own)
        silent = {n: sign for n, sign in enumerate(now) if not alive[n] and n not in told and n != self.rank}
        if silent:
            return self._silent(silent, raw)
        if told:
            return self._failed(told)
        reached = max((sign.step, sign.calls) for sign in now)
        behind = {n: sign for n, sign in enumerate(now) if (sign.step, sign.calls) < reached and n != self.rank}
        if behind:
            return RankError(
                message(
                    f"{_named(behind)} of {self.count} did not come to where the others waited",
                    where=self._place,
                    found=f"{_places(behind)}; {raw}",
                    remedy=REMEDY,
                )
            )
        others = {n: sign for n, sign in enumerate(now) if n != self.rank}
        return RankError(
            message(
                "the processes of the run lost each other",
                where=self._place,
                found=f"all alive: {_places(others)}; {raw}",
                remedy="Look at the network between them. " + REMEDY,
            )
        )

    def _silent(self, lost: Mapping[int, Sign | None], raw: str) -> RankError:
        known = {n: sign for n, sign in lost.items() if sign is not None}
        places = _places(known) if known else "nothing was heard of it"
        what = f"{_named(lost)} of {self.count} does not answer"
        return RankError(message(what, where=self._place, found=f"{places}; {raw}", remedy=REMEDY))

    def _failed(self, faults: dict[int, tuple[str, str]]) -> RankError:
        """Another's own fault, in its words; one that quotes a third is passed on as it is."""
        number, (kind, text) = min(faults.items(), key=lambda item: (item[1][0] == RankError.__name__, item[0]))
        if kind == RankError.__name__:
            return RankError(text)
        return RankError(
            message(
                f"{_named(faults)} of {self.count} failed, and the run with it",
                where=self._place,
                found=f"{kind}: {text}" if len(faults) == 1 else f"rank {number}: {kind}: {text}",
            )
        )

    def _of_heard(self) -> RankError:
        own = {n: words for n, words in self._heard.items() if words[0] != RankError.__name__}
        return self._failed(own or self._heard)

    def _look(self) -> tuple[list[bool], list[Sign]] | None:
        """Who gives signs of life and what each said last; None where the store does not answer."""
        found: list[tuple[list[bool], list[Sign]]] = []

        def look() -> None:
            with contextlib.suppress(RuntimeError):  # the store is gone
                before = self._read()
                time.sleep(2.5 * BEAT)
                now = self._read()
                alive = [a.beat != b.beat and not b.ended for a, b in zip(before, now, strict=True)]
                found.append((alive, now))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(2.5 * BEAT + LISTENING)
        return found[0] if found else None

    def _read(self) -> list[Sign]:
        with self._asking:
            return [Sign.parse(text) for text in self._reader.multi_get(self._keys)]

    # ------------------------------------------------------------------ the thread

    def _write(self, *, alarm: bool = False) -> None:
        """Put this process's sign into the store, which is not waited for."""
        with self._writing, contextlib.suppress(RuntimeError):  # the store is gone: whoever waits will find out
            self._beat += 1
            sign = Sign(self._beat, self._calls, self._step, self._place, time.time(), self._fault, self._ended)
            self._writer.set(self._keys[self.rank], json.dumps(vars(sign)))
            if alarm:
                self._writer.set(self._alarm, "1")

    def _live(self) -> None:
        while not self._closed.wait(BEAT):
            self._write()
            try:
                self._listen()
            except RuntimeError:  # the store is gone
                return
            if self._since is not None and self._inside and self._fault is None:
                if time.monotonic() - self._since > GRACE:
                    self._end()
            else:
                self._since = None

    def _listen(self) -> None:
        if self.host not in (None, self.rank):
            with self._asking:
                self._known[self.host] = Sign.parse(self._reader.get(self._keys[self.host]))
        with self._asking:
            alarmed = self._reader.check([self._alarm])
        if not alarmed:
            return
        for number, sign in enumerate(self._read()):
            if sign.fault is not None and number != self.rank:
                self._heard[number] = sign.fault
        if self._heard and self._since is None:
            self._since = time.monotonic()

    def _end(self) -> None:
        """End a process whose main thread waits in a collective that nobody else will come to any more."""
        sys.stderr.write(f"adapters: {self._of_heard()}\n")
        sys.stderr.flush()
        os._exit(RankError.exit_code)

    def _linger(self) -> None:
        """Stay, with the store, until those who live have ended or failed too, which takes them a moment."""
        begin = time.monotonic()
        beats: dict[int, tuple[int, float]] = {}  # by process: its last sign, and when that was new
        while (now := time.monotonic()) < begin + LINGER:
            try:
                signs = self._read()
            except RuntimeError:
                return
            for number, sign in enumerate(signs):
                if beats.get(number, (0, 0.0))[0] != sign.beat:
                    beats[number] = sign.beat, now
            lives = [n for n, (_, at) in beats.items() if now - at < 2.5 * BEAT and n != self.rank]
            if all(signs[n].fault or signs[n].ended for n in lives):
                return
            time.sleep(BEAT / 10)


def _named(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _places(signs: Mapping[int, Sign]) -> str:
    return ", ".join(f"rank {n} {'ended, ' if s.ended else ''}{s.seen()}" for n, s in sorted(signs.items()))

