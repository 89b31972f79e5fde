"""What an interrupt leaves: Ctrl-C and the signals that end a process unwind it, and say what was kept.

A job that is interrupted puts a line on the exception as it passes (`add_note`); the command line prints it.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

# Beside SIGINT, which Python raises as KeyboardInterrupt.
ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def leaving(line: Callable[[], str]) -> Iterator[None]:
    """Within it an interrupt takes a line along, where nothing further in has given it one.

    Args:
        line: says what is left and how to go on; called after the interrupt; empty for nothing to say.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as fault:
        if not notes(fault) and (said := line()):
            fault.add_note(said)
        raise


def notes(fault: BaseException) -> list[str]:
    """The lines that an interrupt took along, each once, the innermost first."""
    return list(dict.fromkeys(getattr(fault, "__notes__", ())))


def unwind() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does: through every `finally`, with 128 + their number.

    Where they are ignored (nohup) or taken already they stay so.
    """
    for number in ENDING:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _end)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def last() -> None:
    """Nothing is left to be put in order: a further Ctrl-C ends the process without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
