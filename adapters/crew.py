"""Threads that do one list of tasks; what ends one of them ends them all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from typing import final

LARGEST = 8  # threads; beyond it a disk is the limit, and each holds buffers


class Ended(Exception):  # no error: the way out of a task whose crew is ending
    """Another thread of the crew met a fault, or the run was interrupted."""


def size() -> int:
    """How many threads keep this process's cores busy while one of them waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(LARGEST, cores + 1)


@final
class Crew:
    """A few threads, each taking the next task when it has done one.

    They gain where tasks let go of the interpreter's lock: reads, writes, hashes, matmuls.

    Args:
        threads: how many.
    """

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._over = threading.Event()
        self._lock = threading.Lock()

    def check(self) -> None:
        """Between two parts of a long task: raise `Ended` where there is no sense in going on."""
        if self._over.is_set():
            raise Ended

    def run(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Do every task; return, or raise, when no thread is left.

        Raises:
            BaseException: the first fault of a task, as it was raised there; KeyboardInterrupt of the caller's thread.
        """
        waiting = iter(tasks)
        faults: list[BaseException] = []

        ended = [threading.Event() for _ in range(self._threads)]

        def work(number: int) -> None:
            try:
                while True:
                    with self._lock:
                        self.check()
                        task = next(waiting, None)
                    if task is None:
                        return
                    task()
            except Ended:
                pass
            except BaseException as fault:
                with self._lock:
                    faults.append(fault)
                self._over.set()
            finally:
                ended[number].set()

        threads = [
            threading.Thread(target=work, args=(number,), name=f"crew-{number}") for number in range(self._threads)
        ]
        begun = 0
        try:
            for thread in threads:
                begun += 1
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._over.set()
            for thread, end in zip(threads[:begun], ended, strict=False):
                # An interrupt in the midst of a start leaves a thread that does not count as begun, but is.
                if end.wait(1) or thread.ident is not None:
                    thread.join()
            raise
        if faults:
            raise faults[0]
