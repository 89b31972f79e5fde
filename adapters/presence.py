"""Where each process of a run is, told through the store in which the processes met; who fell silent, and whose fault.

A process that waits for others in a collective learns from torch that it waited in vain, not for whom. So each writes
beside it, into the store, where it is and that it lives, and what stopped it; whoever waits in vain reads what the
others wrote. A thread writes and listens, so that a process speaks while it computes.
"""

from __future__ import annotations

import atexit
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
SKEW = 1.5  # seconds within which all that wait in one collective find out that they wait in vain
LOOK = 3.0  # seconds without a sign after which a process counts as silent, where another waits for it in vain
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
    place: str
    at: float  # seconds of its clock
    doing: str = ""  # where its main thread was at its last beat
    fault: tuple[str, str] | None = None  # class and words of what stopped it
    vain: bool = False  # it waited for others in vain
    heard: bool = False  # it knows what stopped another
    ended: bool = False

    @classmethod
    def parse(cls, text: bytes) -> Sign:
        """From what lies in the store."""
        found: dict[str, Any] = json.loads(text)
        fault = found.pop("fault")
        return cls(**found, fault=tuple(fault) if fault else None)

    def seen(self) -> str:
        """When and where it was."""
        doing = f", in {self.doing}" if self.doing else ""
        return f"last heard of {max(0.0, time.time() - self.at):.1f} s ago at {self.place}{doing}"


@dataclass(frozen=True)
class _Look:
    """What was seen of all processes."""

    signs: list[Sign]
    alive: list[bool]  # which of them gave a sign meanwhile
    late: set[int]  # which of them did not wait where the others did


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
        self._beat = 0
        self._place = "its beginning"
        self._fault: tuple[str, str] | None = None
        self._vain = self._ended = self._gone = False
        self._main = threading.get_ident()
        self._heard: dict[int, tuple[str, str]] = {}
        self._since: float | None = None  # when a fault was heard
        self._known: list[Sign] = []  # of all at the beginning; of the store's own process, the last
        self._seen: dict[int, tuple[Sign, float]] = {}  # by process: the last sign, and when it was new
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
        self._known = list(self._read())
        self._thread.start()
        # An interpreter that ends stops such a thread wherever it is; within the store that aborts the process.
        atexit.register(self.close)

    def close(self) -> None:
        """Speak and listen no more; the thread is waited for, which may be in the middle of a word."""
        self._closed.set()
        atexit.unregister(self.close)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(LISTENING)

    # ------------------------------------------------------------------ what this process says

    def at(self, place: str) -> None:
        """Tell where this process is.

        Args:
            place: in words, "step 3".

        Raises:
            RankError: another process has failed meanwhile.
        """
        self._place = place
        self._write()
        self.check()

    def arrive(self) -> None:
        """Tell that this process has come to a collective.

        Raises:
            RankError: another process has failed meanwhile.
        """
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

    def expect(self, number: int, patience: float) -> None:
        """Stop waiting for a process that has failed or lives no more; else do nothing.

        Args:
            number: the process.
            patience: seconds that it may be silent.

        Raises:
            RankError: naming it.
        """
        self.check()
        sign, now = self._seen.get(number), time.monotonic()
        if sign is None or now - sign[1] > BEAT:
            read = self._read()[number]
            if sign is None or read.beat != sign[0].beat:
                self._seen[number] = read, now
            elif now - sign[1] > max(patience, LOOK):
                self._vain = True
                raise RankError(self._silent({number: read}, f"no sign of life for {now - sign[1]:.0f} s"))

    def check(self) -> None:
        """Stop where another process has failed.

        Raises:
            RankError: with its words.
        """
        if self._heard and self._inside and self._fault is None:
            raise RankError(self._of_heard())

    # ------------------------------------------------------------------ what the others said

    def explained(self, fault: BaseException) -> str:
        """A collective that failed: for whom this process waited, in words.

        Args:
            fault: what torch raised.
        """
        self._vain = True
        self._write()
        raw = f"torch says: {' '.join(str(fault).split())[:160]}"
        looked = self._look()
        if looked is None:
            return self._of_heard() if self._heard else self._of_store(raw)
        others = {n: sign for n, sign in enumerate(looked.signs) if n != self.rank}
        told = self._heard | {n: sign.fault for n, sign in others.items() if sign.fault}
        own = {n: words for n, words in told.items() if words[0] != RankError.__name__}
        if own:
            return self._failed(own)
        silent = {n: sign for n, sign in others.items() if not (looked.alive[n] or sign.vain or n in told)}
        if silent:
            return self._silent(silent, raw)
        if told:
            return self._failed(told)
        late = {n: sign for n, sign in others.items() if n in looked.late}
        if late:
            what = f"{_named(late)} of {self.count} did not come to where the others waited"
            return message(what, where=self._place, found=f"{_places(late)}; {raw}", remedy=REMEDY)
        return message(
            "the processes of the run lost each other",
            where=self._place,
            found=f"all alive: {_places(others)}; {raw}",
            remedy="Look at the network between them. " + REMEDY,
        )

    def _silent(self, lost: Mapping[int, Sign], raw: str) -> str:
        what = f"{_named(lost)} of {self.count} does not answer"
        return message(what, where=self._place, found=f"{_places(lost)}; {raw}", remedy=REMEDY)

    def _of_store(self, raw: str) -> str:
        """The store is gone, and with it the process that it was in."""
        if self.host is None:
            return message("the launcher's store does not answer", where=self._place, found=raw)
        return self._silent({self.host: self._known[self.host]}, raw)

    def _failed(self, faults: dict[int, tuple[str, str]]) -> str:
        """Another's own fault, in its words; one that quotes a third is passed on as it is."""
        number, (kind, text) = min(faults.items(), key=lambda item: (item[1][0] == RankError.__name__, item[0]))
        if kind == RankError.__name__:
            return text
        return message(
            f"{_named(faults)} of {self.count} failed, and the run with it",
            where=self._place,
            found=f"{kind}: {text}" if len(faults) == 1 else f"rank {number}: {kind}: {text}",
        )

    def _of_heard(self) -> str:
        own = {n: words for n, words in self._heard.items() if words[0] != RankError.__name__}
        return self._failed(own or self._heard)

    def _look(self) -> _Look | None:
        """What the others say in the moments after a wait in vain; None where the store does not answer."""
        found: list[_Look] = []

        def look() -> None:
            begin, late = time.monotonic(), None
            with contextlib.suppress(RuntimeError):  # the store is gone
                before = now = self._read()
                while True:
                    told = [sign.fault for sign in now]
                    alive = [a.beat != b.beat and not b.ended for a, b in zip(before, now, strict=True)]
                    if any(fault and fault[0] != RankError.__name__ for fault in told):
                        break
                    if all(sign.fault or sign.vain for sign in now):
                        break
                    past = time.monotonic() - begin
                    if late is None and past > SKEW:
                        late = {n for n, sign in enumerate(now) if not (sign.vain or sign.fault)}
                    if late is not None and (all(alive) or past > LOOK):
                        break
                    time.sleep(BEAT / 5)
                    now = self._read()
                found.append(_Look(now, alive, late or set()))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(LOOK + LISTENING)
        return found[0] if found else None

    def _read(self) -> list[Sign]:
        with self._asking:
            return [Sign.parse(text) for text in self._reader.multi_get(self._keys)]

    # ------------------------------------------------------------------ the thread

    def _write(self, *, doing: str = "", alarm: bool = False) -> None:
        """Put this process's sign into the store, which is not waited for."""
        with self._writing:
            if self._gone:
                return
            self._beat += 1
            place = (self._beat, self._place, time.time(), doing)
            sign = Sign(*place, self._fault, self._vain, bool(self._heard), self._ended)
            try:
                self._writer.set(self._keys[self.rank], json.dumps(vars(sign)))
                if alarm:
                    self._writer.set(self._alarm, "1")
            except RuntimeError:  # whoever waits will find out
                self._gone = True

    def _live(self) -> None:
        there = True
        while not self._closed.wait(BEAT):
            if there:
                self._write(doing=self._doing())
                try:
                    self._listen()
                except RuntimeError:  # the store is gone, and the process that it was in
                    there = False
                    self._since = self._since or time.monotonic()
            busy = self._inside and self._fault is None and not self._vain
            if not busy:
                self._since = None
            elif self._since is not None and time.monotonic() - self._since > GRACE:
                self._end()

    def _doing(self) -> str:
        """Where the main thread is."""
        frame = sys._current_frames().get(self._main)
        if frame is None:
            return ""
        code = frame.f_code
        return f"{code.co_name} ({os.path.basename(code.co_filename)}:{frame.f_lineno})"

    def _listen(self) -> None:
        if self.host is not None and self.host != self.rank:
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
            self._write()

    def _end(self) -> None:
        """End a process whose main thread waits in a collective that nobody else will come to any more."""
        sys.stderr.write(f"adapters: {self._of_heard() if self._heard else self._of_store('its store is gone')}\n")
        sys.stderr.flush()
        os._exit(RankError.exit_code)

    def _linger(self) -> None:
        """Stay, with the store, until those who live have heard what stops this process, which takes them a moment."""
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
            if all(signs[n].fault or signs[n].heard or signs[n].ended for n in lives):
                return
            time.sleep(BEAT / 10)


def _named(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(map(str, numbers))}"


def _places(signs: Mapping[int, Sign]) -> str:
    return ", ".join(f"rank {n} {'ended, ' if s.ended else ''}{s.seen()}" for n, s in sorted(signs.items()))
