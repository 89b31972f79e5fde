"""Long jobs shown: what is done, how much of it, how fast, and how long it will still take.

A library is silent: a job is logged at INFO, and no thread runs. The command line calls `show`; from then on a terminal
has one live line for the job at hand, anything else a plain line now and then. A job that ends within a second is not
shown at all.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Final, TextIO, final

from adapters.screen import Screen, is_terminal

logger = logging.getLogger(__name__)

DELAY: Final = 1.0  # seconds that a job takes before it is shown
EVERY: Final = 10.0  # seconds between the plain lines of a job
TICK: Final = 0.125  # seconds between two pictures of a live line
LINGER: Final = 5.0  # seconds without a job after which the thread that draws ends
POINTS: Final = 64  # moments of a job that its rate is taken from
OFF: Final = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")

_LOCK = threading.RLock()
_JOBS: list[Job] = []  # that are open, in the order in which they began
_SCREENS: list[Screen] = []  # the last one counts; none is a library's silence
_WAKE = threading.Event()
_DRAWERS: list[threading.Thread] = []


@final
class Job:
    """A long job. Use it in a `with`: an exception takes its line away, and it is not said to be done.

    Args:
        what: what is being done, as a word that ends in -ing.
        total: how much there is; None where nobody knows.
        unit: of what, in the plural; "bytes" are shown as kB, MB, GB.
        done: how much was done before.

    Attributes:
        note: what stands behind the numbers.
    """

    def __init__(self, what: str, total: float | None = None, unit: str = "rows", done: float = 0) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self._first = done
        self.note = ""
        self.began = time.monotonic()
        self._screen: Screen | None
        self._owner = threading.get_ident()
        self._points: list[tuple[float, float]] = [(self.began, done)]
        self._said = self.began
        self._spoken = False
        self.open = True
        with _LOCK:
            self.inner = bool(_JOBS)
            self._screen = _JOBS[-1]._screen if _JOBS else _screen()
            _JOBS.append(self)
        if self._screen is not None:
            _awake()

    def advance(self, count: float = 1) -> None:
        """So much more is done; any thread may say so."""
        with _LOCK:
            self.done += count
        if self._screen is None:
            self._log()

    def grow(self, more: float) -> None:
        """There is so much more to be done than was known."""
        with _LOCK:
            self.total = (self.total or 0) + more

    def to(self, done: float) -> None:
        """So much is done by now."""
        self.done = done
        if self._screen is None:
            self._log()

    def close(self, *, whole: bool = True) -> None:
        """The job has ended, and with it what it began in its thread and did not end; a second time does nothing.

        Args:
            whole: it came to its end: a job that took a while leaves one line.
        """
        with _LOCK:
            if not self.open:
                return
            self.open = False
            later = _JOBS[_JOBS.index(self) + 1 :]
            _JOBS.remove(self)
        for job in later:
            if job._owner == self._owner:
                job.close(whole=False)
        screen = self._screen
        age = time.monotonic() - self.began
        last = whole and age >= DELAY and (not self.inner or self._spoken)
        if screen is None:
            if last:
                logger.info("%s", self.ended(age))
            return
        with screen.lock:
            screen.clear()
            if last:
                screen.line(self.ended(age))

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close(whole=kind is None)

    # ------------------------------------------------------------------ what is said of it

    def _log(self) -> None:
        """A line now and then, for those who listen at INFO."""
        now = time.monotonic()
        if now - self._said >= EVERY and logger.isEnabledFor(logging.INFO):
            self.measure(now)
            self._said, self._spoken = now, True
            logger.info("%s", self.line())

    def plain(self, screen: Screen, now: float) -> None:
        """The same for a screen on which no line can change."""
        if now - self._said >= EVERY:
            self._said, self._spoken = now, True
            screen.line(self.line())

    def measure(self, now: float) -> None:
        """Take a point of time down, from which rates are taken."""
        if now - self._points[-1][0] >= TICK:
            self._points.append((now, self.done))
        if len(self._points) > POINTS:
            self._points = self._points[::2]

    def rate(self, now: float) -> float:
        """Units a second over the later half of the time so far: what pauses now and then stays an average."""
        middle = self.began + (now - self.began) / 2
        when, done = next((point for point in reversed(self._points) if point[0] <= middle), self._points[0])
        return (self.done - done) / max(now - when, 1e-9)

    def share(self) -> float | None:
        """How much of it is done; None where nobody knows."""
        if not self.total or self.total < 0:
            return None
        return min(1.0, max(0.0, self.done / self.total))

    def numbers(self) -> list[str]:
        """Percent, amount, rate and time left, as far as they are known; where nothing is counted, the time so far."""
        now = time.monotonic()
        share, rate = self.share(), self.rate(now)
        if share is None and not self.done:
            return [clock(now - self.began)]
        found = [] if share is None else [f"{int(100 * share)} %"]
        found.append(amount(self.done, None if share is None else self.total, self.unit))
        if rate > 0 and self.done > self._first:
            found.append(speed(rate, self.unit))
            if share is not None and self.total:
                found.append(f"{clock(max(0.0, self.total - self.done) / rate)} left")
        if share is None:
            found.append(clock(now - self.began))
        return found

    def line(self) -> str:
        """One plain line."""
        return f"{self.what}: {', '.join(self.numbers())}" + (f"; {self.note}" if self.note else "")

    def ended(self, age: float) -> str:
        """The line that stays."""
        done = self.done - self._first
        took = f"{age:.1f} s" if age < 60 else clock(age)
        text = f"{self.what}: {took}"
        if done > 0:
            text = f"{self.what}: {amount(self.done, None, self.unit)} in {took} ({speed(done / age, self.unit)})"
        return text + (f"; {self.note}" if self.note else "")


def at_hand() -> Job | None:
    """The job that began last, in whatever thread; None where there is none."""
    with _LOCK:
        return _JOBS[-1] if _JOBS else None


def count(more: float = 1) -> None:
    """So much more of the job that this thread is at; nothing where there is none."""
    here = threading.get_ident()
    with _LOCK:
        job = next((job for job in reversed(_JOBS) if job._owner == here), None)
    if job is not None:
        job.to(min(job.done + more, job.total if job.total else job.done + more))


def chunks(total: int, size: int) -> Iterator[int]:
    """The beginnings of chunks of so many; when the next is asked for, the last one counts as done (see `count`)."""
    for begin in range(0, total, size):
        yield begin
        count(min(size, total - begin))


@contextlib.contextmanager
def tamed() -> Iterator[None]:
    """Within it bars of datasets stay away from a file or a pipe; on a terminal they stand above our own line."""
    import datasets

    screen = _JOBS[-1]._screen if _JOBS else None
    if datasets.are_progress_bars_disabled() or (screen is not None and screen.live):
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


# ---------------------------------------------------------------------- who sees it


def show(stream: TextIO | None = None) -> None:
    """Show jobs from here on; nothing happens where bars are switched off by the user's environment.

    Args:
        stream: where; None for standard error.
    """
    stream = sys.stderr if stream is None else stream
    if stream is None or any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFF):
        return
    screen = Screen(stream)
    with _LOCK:
        if not _SCREENS:
            _once()
        _SCREENS.append(screen)
    screen.share()


def hide() -> None:
    """Take the last `show` back."""
    with _LOCK:
        screen = _SCREENS.pop() if _SCREENS else None
    if screen is not None:
        screen.unshare()


def end() -> None:
    """Nothing is shown any more: whatever jobs are open, an error is being told, or the process ends."""
    with _LOCK:
        jobs = list(_JOBS)
    for job in reversed(jobs):
        job.close(whole=False)
    while _SCREENS:
        hide()


def shown() -> bool:
    """Whether a job that begins now is shown."""
    return _screen() is not None


@contextlib.contextmanager
def showing(*, wanted: bool = True) -> Iterator[None]:
    """Within it jobs are shown on a terminal, where they were not already; elsewhere nothing changes."""
    if not wanted or _SCREENS or not is_terminal(sys.stderr):
        yield
        return
    show()
    try:
        yield
    finally:
        hide()


def _screen() -> Screen | None:
    """Where a job is shown that begins now; None where other libraries were told to show none."""
    if not _SCREENS:
        return None
    hub: Any = sys.modules.get("transformers.utils.logging")
    sets: Any = sys.modules.get("datasets.utils.tqdm")
    if (hub and not hub.is_progress_bar_enabled()) or (sets and sets.are_progress_bars_disabled()):
        return None
    return _SCREENS[-1]


_READY: list[bool] = []


def _once() -> None:
    if not _READY:
        _READY.append(True)
        atexit.register(end)
        os.register_at_fork(after_in_child=_forget)


def _forget() -> None:
    """In a forked child: it has no thread that draws, and its parent's locks may be held by nobody."""
    global _LOCK
    _LOCK = threading.RLock()
    for screen in _SCREENS:
        screen.lock = threading.RLock()
        screen.unshare()
    _SCREENS.clear()
    _JOBS.clear()
    _DRAWERS.clear()


# ---------------------------------------------------------------------- the thread that draws


def _awake() -> None:
    with _LOCK:
        _WAKE.set()
        if not _DRAWERS or not _DRAWERS[0].is_alive():
            _DRAWERS[:] = [threading.Thread(target=_drawing, name="progress", daemon=True)]
            _DRAWERS[0].start()


def _drawing() -> None:
    while _WAKE.wait(LINGER):
        time.sleep(TICK)
        with _LOCK:
            jobs = list(_JOBS)
            if not jobs:
                _WAKE.clear()
        if jobs:
            _picture(jobs)
    with _LOCK:
        if _DRAWERS and _DRAWERS[0] is threading.current_thread():
            _DRAWERS.clear()


def _picture(jobs: list[Job]) -> None:
    now = time.monotonic()
    old = [job for job in jobs if now - job.began >= DELAY and job._screen is not None]
    for job in old:
        job.measure(now)
    if not old:
        return
    screen = old[-1]._screen
    assert screen is not None
    with screen.lock:
        if not old[-1].open:
            return
        if not screen.live:
            old[-1].plain(screen, now)
            return
        around = [f"{job.what} {int(100 * share)} %" for job in old[:-1] if (share := job.share()) is not None]
        last = old[-1]
        numbers = last.numbers() + ([last.note] if last.note else [])
        screen.draw(" > ".join([*around, last.what]), last.share(), numbers)


# ---------------------------------------------------------------------- numbers


def clock(seconds: float) -> str:
    """0:07, 12:05, 1:02:33."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _scaled(count: float) -> tuple[float, str]:
    """Bytes in the unit that leaves few digits."""
    for size, unit in ((1e9, "GB"), (1e6, "MB")):
        if count >= size:
            return count / size, unit
    return count / 1e3, "kB"


def amount(done: float, total: float | None, unit: str) -> str:
    """1,200 of 5,000 rows; 0.6 of 1.7 GB."""
    if unit == "bytes":
        value, scale = _scaled(total if total is not None else done)
        first = "" if total is None else f"{value * done / total:.1f} of "
        return f"{first}{value:.1f} {scale}"
    return f"{done:,.0f} {unit}" if total is None else f"{done:,.0f} of {total:,.0f} {unit}"


def speed(rate: float, unit: str) -> str:
    """1,560 rows/s, 210.0 MB/s, 0.31 steps/s."""
    if unit == "bytes":
        value, scale = _scaled(rate)
        return f"{value:.1f} {scale}/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s" if rate >= 1 else f"{rate:.2g} {unit}/s"
