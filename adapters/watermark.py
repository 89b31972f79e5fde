"""The most memory that this process, and its GPU, had at once within a while.

On Linux the kernel counts the resident pages of a process and its highest number (`VmHWM`), which can be set back to
what is resident now; before that, what the allocator holds free is given back. Elsewhere the resident memory is looked
at a hundred times a second. A GPU's number is torch's own count of what its tensors took.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

STATUS: Final = Path("/proc/self/status")
SET_BACK: Final = Path("/proc/self/clear_refs")
EVERY: Final = 0.01  # seconds between two looks
COUNTED: Final = "the kernel's highest count of resident memory (VmHWM), set back before each trial"
LOOKED: Final = "resident memory, looked at a hundred times a second"
ON_GPU: Final = "torch's highest count of what tensors took on the GPU, set back before each trial"


@final
@dataclass
class Watermark:
    """What was measured, once it is over.

    Attributes:
        bytes: of the process: with torch, the backbone and all that was there before.
        gpu_bytes: of the GPU; None where there is none.
        how: how it was measured.
    """

    bytes: int = 0
    gpu_bytes: int | None = None
    how: str = ""


@contextlib.contextmanager
def watched() -> Iterator[Watermark]:
    """Within it memory is watched; what it yields is filled at the end."""
    mark = Watermark()
    torch: Any = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available()
    gc.collect()
    trim()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    counted = _set_back()
    looking = None if counted else _Looking()
    try:
        yield mark
    finally:
        mark.bytes = looking.end() if looking is not None else _highest()
        mark.gpu_bytes = int(torch.cuda.max_memory_allocated()) if gpu else None
        mark.how = ON_GPU if gpu else COUNTED if counted else LOOKED


def _set_back() -> bool:
    try:
        SET_BACK.write_text("5")
        return _highest() > 0
    except OSError:
        return False


def _highest() -> int:
    """The kernel's highest count of resident bytes; 0 where it has none."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


def trim() -> None:
    """Give back to the system what the C library's allocator holds free; where it cannot, nothing happens."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@final
class _Looking:
    """A thread that looks at the resident memory again and again."""

    def __init__(self) -> None:
        import psutil

        self._process, self._most, self._over = psutil.Process(), 0, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(EVERY):
            self._most = max(self._most, int(self._process.memory_info().rss))

    def end(self) -> int:
        """The most that was seen."""
        self._over.set()
        self._thread.join()
        return max(self._most, int(self._process.memory_info().rss))
