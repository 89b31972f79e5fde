"""Checkpoint folders: sealed with their files' digests, verified before use, rotated by the run that wrote them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from adapters import shards
from adapters.errors import FolderError, message

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.json"  # written last: sizes and digests of a checkpoint's files


def step_of(folder: Path) -> int:
    tail = folder.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else -1


def run_of(folder: Path) -> str:
    """The run that wrote a checkpoint; empty where it is not a checkpoint of ours."""
    try:
        return str(json.loads((folder / CHECKPOINT).read_text())["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def seal(folder: Path, run: str) -> None:
    """Flush a checkpoint's files and write their sizes and digests, last."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb+") as stream:
                shards.flush(stream)
            files[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": shards.sha256(file)}
    document: dict[str, Any] = {"run": run, "files": files}
    document["digest"] = shards.digest_of(document)
    shards.write_text(folder / CHECKPOINT, json.dumps(document, indent=1) + "\n")
    shards.sync_folder(folder)


def verify(folder: Path) -> None:
    """Check a checkpoint's files against its manifest.

    Raises:
        FolderError: no manifest, or a file that is missing, truncated or changed.
    """
    try:
        document = json.loads((folder / CHECKPOINT).read_text())
    except (OSError, ValueError) as fault:
        raise FolderError(message("not a whole checkpoint", where=str(folder), found=fault)) from fault
    if document.get("digest") != shards.digest_of(document):
        raise FolderError(message("the checkpoint's manifest was changed", where=str(folder / CHECKPOINT)))
    for name, entry in document["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != entry["size"] or shards.sha256(file) != entry["sha256"]:
            raise FolderError(message("a checkpoint file is missing or changed", where=str(file)))


def newest(run: Path) -> Path:
    """The newest whole checkpoint of an output folder; says which newer ones were skipped and why.

    Raises:
        FolderError: there is none.
    """
    for folder in sorted(run.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            verify(folder)
        except FolderError as fault:
            logger.warning("skipped %s: %s", folder, fault)
            continue
        return folder
    raise FolderError(message("no whole checkpoint to resume from", where=str(run), remedy="Train from the start."))


def rotate(folder: Path, run: str, keep: int | None, best: str | None) -> None:
    """Delete this run's older checkpoints beyond `keep`, never the best one and nothing that the run did not write."""
    if not keep:
        return
    ours = sorted((entry for entry in folder.glob("checkpoint-*") if run_of(entry) == run), key=step_of)
    others = [entry for entry in ours if str(entry) != best]
    room = max(1, keep - (len(ours) - len(others)))
    for entry in others[:-room]:
        shards.remove(entry)
