"""A run that its launcher has started again: whose launch it is, and from which checkpoint it goes on by itself."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

from adapters import checkpoints, ranks
from adapters.errors import FolderError

logger = logging.getLogger(__name__)

# Set by torchrun (and accelerate launch, which calls it), in every process that it starts.
COUNT, LAUNCH = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_RUN_ID"
IF_ANY = "auto"  # resume_from_checkpoint: go on where there is a checkpoint, else begin


def launch() -> str:
    """What tells the launch that this process belongs to from all others, through all its restarts; empty for none.

    torchrun names a launch only where it is told a name, or started with --standalone; else it is known by the
    launcher's own process.
    """
    name = os.environ.get(LAUNCH, "")
    if name in ("", "none"):
        if COUNT not in os.environ:
            return ""
        import psutil

        parent = psutil.Process(os.getppid())
        return f"{socket.gethostname()} {parent.pid} {parent.create_time():.2f}"
    return name


def restarted() -> bool:
    """Whether the launcher has started this run again; the same in all processes, which all ask."""
    said = os.environ.get(COUNT, "0")
    return any(ranks.gathered(said.isdigit() and int(said) > 0))


def wanted(asked: str | bool | None, run: Path) -> str | bool | None:
    """From what a run goes on, all processes alike.

    Args:
        asked: as `Trainer.train` was asked; None begins, but in a run that was restarted goes on from the newest whole
            checkpoint that this very launch has written.
        run: the output folder.

    Returns:
        A checkpoint's folder, True for the newest whole one, None for none.
    """
    if asked is None and restarted():
        found: str | None = ranks.told(ranks.by_first(lambda: _own(run)))
        if ranks.first():
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
    return runs.agreed(found, run, *others) if found else None


def _is_checkpoint(folder: Path) -> bool:
    return checkpoints.step_of(folder) >= 0


def _own(run: Path) -> str | None:
    """The newest whole checkpoint of this launch; what is damaged is said."""
    for folder in sorted(filter(_is_checkpoint, run.glob("checkpoint-*")), key=checkpoints.step_of, reverse=True):
        try:
            if checkpoints.verify(folder).get("launch", "") == launch():
                return str(folder)
        except FolderError as fault:
            logger.warning("skipped %s: %s", folder.name, fault)
    return None
