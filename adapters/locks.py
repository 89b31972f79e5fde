"""One process at a time: a lock on a file, held as long as the process that took it lives."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from adapters.errors import FolderError, message

_HELD: set[str] = set()  # a process does not keep itself out by a record lock


@contextlib.contextmanager
def held(file: Path, what: str) -> Iterator[None]:
    """Hold the lock that a file stands for; the file holds this process' number and is gone afterwards.

    A record lock: the system drops it when the process ends, and child processes do not inherit it.

    Args:
        file: the lock's file; its folder is made where it is not there.
        what: what is locked, for the message.

    Raises:
        FolderError: another process holds it, or the folder cannot be written to.
    """
    place = str(file.absolute())
    if place in _HELD:
        raise _refusal(what, str(os.getpid()))
    handle = _taken(file, what)
    _HELD.add(place)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a file that is left locks nothing
            file.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile finds that it is gone
        os.close(handle)
        _HELD.discard(place)


def _taken(file: Path, what: str) -> int:
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as fault:
            raise FolderError(message("the lock cannot be taken", where=str(file), found=fault)) from fault
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                os.ftruncate(handle, 0)
                os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        except OSError as fault:
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            if isinstance(fault, BlockingIOError | PermissionError):
                raise _refusal(what, holder) from None
            raise FolderError(message("the lock cannot be taken", where=str(file), found=fault)) from fault
        os.close(handle)


def _refusal(what: str, pid: str) -> FolderError:
    return FolderError(
        message(
            "another process is writing there",
            where=what,
            found=f"process {pid or 'unknown'}",
            remedy="Wait until it has ended, or give another output folder.",
        )
    )


def joined(file: Path) -> int:
    """A share of a lock that many may hold at once; the handle gives it back when it is closed, or its process ends.

    The file stays. A share and `alone` keep each other out, between processes and within one.

    Args:
        file: the lock's file; its folder is made where it is not there.

    Raises:
        OSError: the folder cannot be written to, or its file system knows no locks.
    """
    while True:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its folder was deleted meanwhile


def marked(folder: Path) -> int:
    """A handle on a folder that is being written, by which others see that its process lives; -1 handles nothing.

    Raises:
        OSError: the folder cannot be opened.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return handle


def unmarked(folder: Path) -> bool:
    """Whether no living process has marked a folder; False, too, where the file system does not tell."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False
    finally:
        os.close(handle)


@contextlib.contextmanager
def alone(file: Path, *, wait: bool) -> Iterator[bool]:
    """The whole of a lock that is shared by `joined`; yields whether it is held.

    Args:
        file: the lock's file.
        wait: until all others have given it back; else somebody's share yields False at once.

    Raises:
        OSError: the folder cannot be written to, or its file system knows no locks.
    """
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(handle)
