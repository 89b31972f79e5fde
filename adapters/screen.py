"""Where progress is shown: one line that changes on a terminal, a line now and then elsewhere.

Nothing of the terminal is changed: the cursor stays visible, and a process that is killed leaves it as it was.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from typing import Any, Final, TextIO, final

CLEAR: Final = "\r\x1b[K"
FILLED, HALF, REST = "━", "╸", "━"  # of a bar; where the encoding or NO_COLOR forbids: "#", "", "."
NARROW, WIDE = 8, 28  # cells of a bar


def is_terminal(stream: Any) -> bool:
    """Whether lines of this stream can be overwritten."""
    try:
        return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # no stream, or a closed one
        return False


@final
class Screen:
    """One stream that progress goes to.

    Args:
        stream: standard error, as a rule.

    Attributes:
        live: lines can be overwritten: a terminal.
        fancy: the stream takes more than ASCII.
        lock: held while something is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.live = is_terminal(stream)
        self.lock = threading.RLock()
        self._drawn = False
        self._foreign = False  # somebody else's line has begun and not ended
        self._wrapped: dict[str, Any] = {}
        self.fancy = self._encodes(FILLED + HALF)
        self._coloured = self.fancy and not os.environ.get("NO_COLOR")

    def _encodes(self, text: str) -> bool:
        try:
            text.encode(self.stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    # ------------------------------------------------------------------ what is shown

    def draw(self, head: str, share: float | None, tail: list[str]) -> None:
        """The line that changes: what, a bar, and as many of the numbers as there is room for."""
        with self.lock:
            if self._foreign:
                return
            room = self._columns() - 3  # a terminal echoes ^C behind it
            for count in range(len(tail), -1, -1):
                text = "  ".join([head, *tail[:count]])
                left = room - len(text) - 2
                if share is None and left >= -2:
                    break
                if share is not None and left >= NARROW:
                    text = "  ".join([head, self._bar(share, min(left, WIDE)), *tail[:count]])
                    break
            else:
                text = head[: max(0, room)]
            self._put(f"{CLEAR}{text}")
            self._drawn = True

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or 80  # some terminals say 0
        except (OSError, ValueError):
            return 80

    def _bar(self, share: float, cells: int) -> str:
        full = share * cells
        if not self.fancy:
            return "#" * int(full) + "." * (cells - int(full))
        done = FILLED * int(full) + (HALF if full - int(full) >= 0.5 else "")
        rest = cells - len(done)
        if not self._coloured:
            return done + " " * rest
        return f"\x1b[36m{done}\x1b[0m\x1b[2m{REST * rest}\x1b[0m"

    def clear(self) -> None:
        """Take the line that changes away."""
        with self.lock:
            if self._drawn:
                self._put(CLEAR)
                self._drawn = False

    def line(self, text: str) -> None:
        """A line that stays."""
        with self.lock:
            self.clear()
            self._put(f"{text}\n")

    def _put(self, text: str) -> None:
        try:
            self.stream.write(text)
            self.stream.flush()
        except (
            OSError,
            ValueError,
            RuntimeError,
        ):  # a terminal that is gone, a write within a write: no job ends by it
            self._drawn = False

    # ------------------------------------------------------------------ others who write

    def share(self) -> None:
        """Let all that is printed to this terminal from here on stand above the line that changes."""
        for name in ("stderr", "stdout") if self.live else ():
            stream = getattr(sys, name)
            if is_terminal(stream) and not isinstance(stream, Above):
                self._wrapped[name] = stream
                setattr(sys, name, Above(stream, self))

    def unshare(self) -> None:
        """Give the streams back."""
        self.clear()
        for name, stream in self._wrapped.items():
            if isinstance(getattr(sys, name), Above):
                setattr(sys, name, stream)
        self._wrapped = {}

    def above(self, write: Callable[[str], int], text: str) -> int:
        """Write somebody else's text; the line that changes comes again when theirs has ended."""
        with self.lock:
            self.clear()
            count = write(text)
            if text:
                self._foreign = not text.endswith(("\n", "\r"))
            return count


@final
class Above:
    """A stream whose text stands above the line that changes."""

    def __init__(self, stream: TextIO, screen: Screen) -> None:
        self._stream, self._screen = stream, screen

    def write(self, text: str) -> int:
        """As the stream's own."""
        return self._screen.above(self._stream.write, text)

    def writelines(self, lines: Any) -> None:
        """As the stream's own."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
