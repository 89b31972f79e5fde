"""Folders that are written whole or not at all, and a disk that refuses as one error."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from adapters import locks
from adapters.errors import AdaptersError, DiskError, FolderError, message
from adapters.shards import remove, sync_folder


@contextlib.contextmanager
def writing(
    target: Path,
    remedy: str = "Nothing was changed. Make room, or give another output.",
    faults: type[Exception] = Exception,
) -> Iterator[None]:
    """What a full or failing disk does to any writer, as one error that names what was being written.

    Args:
        target: the folder.
        remedy: what stands where now, and what to do.
        faults: what counts; writers in C++ and Rust raise errors of no particular class, so all that are not ours.

    Raises:
        DiskError: anything of it went wrong meanwhile.
    """
    try:
        yield
    except AdaptersError:
        raise
    except faults as fault:
        number = fault.errno if isinstance(fault, OSError) else None
        found = os.strerror(number) if number else f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        refusal = DiskError(message("the folder cannot be written", where=str(target), found=found, remedy=remedy))
        refusal.errno = number
        raise refusal from fault


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` to write into; on success it takes the place of `target`, on failure it is gone.

    The two change places in one step and the old folder is deleted last: whenever the process dies, a whole folder
    stands at `target`.

    Raises:
        DiskError: the disk refuses; what stood there still stands, or the error says that the new one does.
        FolderError: the target is a link.
    """
    if target.is_symlink():
        raise FolderError(
            message("the output is a symbolic link", where=str(target), remedy="Give the folder it points to.")
        )
    stage = target.with_name(f".{target.name}.staging-{os.getpid()}")
    try:
        with writing(target, faults=OSError), contextlib.ExitStack() as alive:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove(stage)
            for stray in target.parent.glob(f".{glob.escape(target.name)}.staging-*"):
                _sweep(stray)
            stage.mkdir()
            alive.callback(os.close, locks.marked(stage))
            yield stage
            sync_folder(stage)
            _replace(target, stage)
    except BaseException:
        with contextlib.suppress(OSError):
            remove(stage)
        raise
    with writing(target, f"The new folder stands, whole. {stage} is what it replaced: delete it where it is left."):
        sync_folder(target.parent)
        remove(stage)


def outcome(target: Path) -> Callable[[], str]:
    """What an interrupt has left of a folder that is written within `staged`: asked now, and called afterwards."""
    before = _identity(target)

    def line() -> str:
        now = _identity(target)
        if now is not None and now != before:
            return f"{target} was written and stands, whole"
        return f"nothing was written to {target}; the same command begins anew"

    return line


def _identity(target: Path) -> tuple[int, int] | None:
    try:
        status = target.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _sweep(stray: Path) -> None:
    """Remove what a killed process has left; what a living one, here or on another machine, is writing stays."""
    number = stray.name.rpartition("-")[2]
    with contextlib.suppress(OSError):
        if number.isdigit() and not Path(f"/proc/{number}").exists() and stray.is_dir() and locks.unmarked(stray):
            remove(stray)


def _replace(target: Path, stage: Path) -> None:
    """Put `stage` in the place of `target`; what stood there is then at `stage`."""
    if not target.exists():
        stage.rename(target)
    elif not _exchanged(target, stage):
        old = target.with_name(f".{target.name}.old-{os.getpid()}")
        target.rename(old)
        try:
            stage.rename(target)
        except BaseException:
            old.rename(target)
            raise
        old.rename(stage)


def _exchanged(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system or the file system cannot."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchanging = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if exchange(here, os.fsencode(one.absolute()), here, os.fsencode(other.absolute()), exchanging) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one))
