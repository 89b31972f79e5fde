"""A run that its launcher has started again: whose launch it is, what that has done, and where it goes on by itself."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from adapters import checkpoints, journal, ranks
from adapters.errors import FolderError

logger = logging.getLogger(__name__)

# Set by torchrun (and accelerate launch, which calls it), in every process that it starts.
COUNT, LAUNCH = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"
DONE = "done"  # the last event of a run that a launcher has started
_BEGUN: set[Path] = set()  # folders of the runs that this very process has begun, or is done with
_LAUNCHERS: list[str] = []  # of the run that goes on
IF_ANY = "auto"  # resume_from_checkpoint: go on where there is a checkpoint, else begin


def launch() -> str:
    """What tells the launch that this process belongs to from all others, through all its restarts; empty for none.

    torchrun names a launch only where it is told a name, or started with --standalone; else it is known by the
    launcher's own process.
    """
    name = os.environ.get(LAUNCH, "")
    return _launcher() if name in ("", "none") else name


def _launcher() -> str:
    """The launcher's own process on this machine, which outlives those that it starts; empty for none."""
    if COUNT not in os.environ:
        return ""
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {parent.pid} {parent.create_time():.2f}"


@final
@dataclass(frozen=True)
class Again:
    """How a launch may know what it has left itself, before it was started again.

    Attributes:
        counted: its launcher says that it was. Where a lost node comes back torchrun may not count.
        launchers: the launchers' own processes, one a machine, as digests.
    """

    counted: bool
    launchers: tuple[str, ...]

    @classmethod
    def asked(cls) -> Again:
        """Of the launch that this is; all processes ask."""
        said = os.environ.get(COUNT, "0")
        launcher = _launcher()
        each = ranks.gathered([said.isdigit() and int(said) > 0, launcher and _digest(launcher)])
        return cls(any(counted for counted, _ in each), tuple(sorted({launcher for _, launcher in each if launcher})))

    def known(self, launchers: Collection[str], folder: Path) -> bool:
        """Whether what this launch left in a folder is from before it was started again.

        Args:
            launchers: that were at work then. A launch of the same name that begins has none of them.
            folder: where it lies.
        """
        return self.counted or (folder.absolute() not in _BEGUN and not {*self.launchers}.isdisjoint(launchers))


def mark(file: Path) -> None:
    """Write into a journal that the run is over, with all that it leaves, and whose launch it was; nothing without one.

    Args:
        file: the journal beside the finished adapter.
    """
    if launch():
        _BEGUN.add(file.parent.absolute())
        book = journal.Journal(file)
        book.resume()
        book.write(DONE, launch=_digest(launch()), launchers=_LAUNCHERS)


def made(file: Path, again: Again) -> bool:
    """Whether a journal says that this very launch is done with the run, before it was started again."""
    if not launch() or not file.is_file():
        return False
    try:
        events = journal.read(file)
    except FolderError:
        return False
    return any(
        event["event"] == DONE
        and event.get("launch") == _digest(launch())
        and again.known(event.get("launchers", ()), file.parent)
        for event in events
    )


def _digest(text: str) -> str:
    """A launch, or a launcher, in a file that others may read: it may name a machine."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def written() -> dict[str, Any]:
    """What a checkpoint says of the launch that writes it."""
    return {"launch": launch(), "launchers": _LAUNCHERS}


def left(run: Path) -> bool:
    """Whether the launcher has started this run again, and a whole checkpoint of this very launch is there.

    Args:
        run: the output folder.
    """
    again = Again.asked() if launch() else None
    return again is not None and bool(ranks.told(ranks.by_first(lambda: _own(run, again))))


def wanted(asked: str | bool | None, run: Path) -> str | bool | None:
    """From what a run goes on, all processes alike.

    Args:
        asked: as `Trainer.train` was asked; None begins, but in a run that was restarted goes on from the newest whole
            checkpoint that this very launch has written.
        run: the output folder.

    Returns:
        A checkpoint's folder, True for the newest whole one, None for none.
    """
    again = Again.asked() if launch() else None
    _LAUNCHERS[:] = again.launchers if again is not None else ()
    if asked is None and again is not None:
        found: str | None = ranks.told(ranks.by_first(lambda: _own(run, again)))
        if ranks.first() and (again.counted or found):
            logger.warning("started again by the launcher: %s", f"goes on from {found}" if found else "begins anew")
        return found
    if asked == IF_ANY:
        there = ranks.told(ranks.by_first(lambda: any(map(_is_checkpoint, run.glob("checkpoint-*")))))
        return True if there else None
    return asked


def place(asked: str | bool | None, run: Path, *others: Any) -> Path | None:
    """The checkpoint that a run goes on from, the same in all processes, whole and this run's own; None to begin.

    Args:
        asked, run: as for `wanted`.
        others: what `runs.agreed` takes beside them.

    Raises:
        AdaptersError: as `runs.agreed`.
    """
    from adapters import runs  # imports torch

    found = wanted(asked, run)
    _BEGUN.add(run.absolute())
    return runs.agreed(found, run, *others) if found else None


def _is_checkpoint(folder: Path) -> bool:
    return checkpoints.step_of(folder) >= 0


def _own(run: Path, again: Again) -> str | None:
    """The newest whole checkpoint of this launch, from before it was started again; what is damaged is said."""
    for folder in sorted(filter(_is_checkpoint, run.glob("checkpoint-*")), key=checkpoints.step_of, reverse=True):
        try:
            said = checkpoints.verify(folder)
        except FolderError as fault:
            logger.warning("skipped %s: %s", folder.name, fault)
            continue
        if said.get("launch", "") == launch() and again.known(said.get("launchers", ()), run):
            return str(folder)
    return None
