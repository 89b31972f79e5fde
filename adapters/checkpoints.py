"""Checkpoint folders: written beside their place and sealed with digests, verified before use, rotated by their run."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters import disk, locks, shards
from adapters.errors import FolderError, message

logger = logging.getLogger(__name__)

CHECKPOINT = "checkpoint.json"  # written last: sizes and digests of a checkpoint's files
MAX_DOCUMENT = 16 << 20  # bytes
REMEDY = "The checkpoints beside it are whole. Make room, then go on with resume_from_checkpoint=True (--resume)."
_NAME = re.compile(r"checkpoint-([0-9]+)")


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was written; -1 where the folder is not named like one."""
    found = _NAME.fullmatch(folder.name)
    return int(found[1]) if found else -1


def read(folder: Path) -> dict[str, Any]:
    """A checkpoint's own document: "run", "terms", "progress", "files" by their path.

    Raises:
        FolderError: there is none, or it was changed.
    """
    file = folder / CHECKPOINT
    if folder.is_symlink() or file.is_symlink():
        raise FolderError(message("a symbolic link instead of a checkpoint", where=str(folder)))
    try:
        document: Any = shards.read_json(file, MAX_DOCUMENT)
        unchanged = document["digest"] == shards.digest_of(document)
        names = list(document["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        found = f"{type(fault).__name__}: {fault}"
        raise FolderError(message("not a whole checkpoint", where=str(folder), found=found)) from fault
    if not unchanged:
        raise FolderError(message("the checkpoint's manifest was changed", where=str(file)))
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FolderError(message("a checkpoint file outside the checkpoint", where=str(file), found=name))
    whole: dict[str, Any] = document
    return whole


def run_of(folder: Path) -> str:
    """The run that wrote a checkpoint; empty where it is not a checkpoint of ours."""
    try:
        return str(read(folder)["run"])
    except (FolderError, KeyError):
        return ""


def verify(folder: Path) -> dict[str, Any]:
    """Check a checkpoint's files against its document, which is given back.

    Raises:
        FolderError: no document, or a file that is missing, truncated, changed or a link.
    """
    document = read(folder)
    for name, entry in document["files"].items():
        file = folder / name
        if file.is_symlink() or not file.is_file():
            raise FolderError(message("a checkpoint file is missing", where=str(file)))
        if file.stat().st_size != entry["size"] or shards.sha256(file) != entry["sha256"]:
            raise FolderError(message("a checkpoint file was changed", where=str(file)))
    return document


@contextlib.contextmanager
def staged(place: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder beside `place` to write a folder of its name into; then it is sealed and moved to its place in one step.

    Whatever happens before that, `place` and the checkpoints beside it stay as they were, and the stage is gone.

    Args:
        place: where the checkpoint goes.
        facts: "run", "terms" and "progress" of its document.

    Raises:
        DiskError: the disk is full or fails.
    """
    stage = place.parent / f".staging-{os.getpid()}"
    try:
        with disk.writing(place, REMEDY):
            shards.remove(stage)
            stage.mkdir(parents=True)
            yield stage
            _seal(stage / place.name, facts)
            aside = _set_aside(place)
            (stage / place.name).rename(place)
            shards.sync_folder(place.parent)
            if aside is not None:
                _discard(aside)
    finally:
        with contextlib.suppress(OSError):
            shards.remove(stage)


def _seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Flush a checkpoint's files and write their sizes and digests, last."""
    files = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb+") as stream:
                shards.flush(stream)
            files[str(file.relative_to(folder))] = {"size": file.stat().st_size, "sha256": shards.sha256(file)}
        else:
            shards.sync_folder(file)
    document: dict[str, Any] = {**facts, "files": files}
    document["digest"] = shards.digest_of(document)
    shards.write_text(folder / CHECKPOINT, json.dumps(document, indent=1) + "\n")
    shards.sync_folder(folder)


def _set_aside(place: Path) -> Path | None:
    """Move away what stands where a checkpoint goes; nobody's files are written over or through."""
    if not place.exists() and not place.is_symlink():
        return None
    number = 1
    while (aside := place.with_name(f"{place.name}.old-{number}")).exists() or aside.is_symlink():
        number += 1
    place.rename(aside)
    return aside


def _discard(folder: Path) -> None:
    """Delete what a run wrote into a checkpoint, its document last; what others put there stays, and is said."""
    try:
        names = sorted(read(folder)["files"])
    except FolderError:
        logger.warning("kept %s: no checkpoint of ours", folder)
        return
    for name in [*names, CHECKPOINT]:
        (folder / name).unlink(missing_ok=True)
    for directory in sorted((entry for entry in folder.rglob("*") if entry.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # somebody's files are in it
            directory.rmdir()
    try:
        folder.rmdir()
    except OSError:
        logger.warning("kept in %s what this run did not write: %s", folder, ", ".join(sorted(os.listdir(folder))))


@contextlib.contextmanager
def owned(run: Path) -> Iterator[None]:
    """An output folder that this process alone writes into, as whole as what died in it has left it.

    Raises:
        FolderError: another process writes there.
    """
    with locks.held(run / ".lock", str(run)):
        recover(run)
        yield


def recover(run: Path) -> None:
    """Put right what processes that died while they wrote have left in an output folder, whose lock is held."""
    with disk.writing(run):
        for stage in run.glob(".staging-*"):
            shards.remove(stage)
        for aside in run.glob("checkpoint-*.old-*"):
            place = aside.with_name(aside.name.rpartition(".old-")[0])
            if run_of(aside) and not place.exists():
                aside.rename(place)


def newest(run: Path, unlike: Callable[[Mapping[str, Any]], str]) -> tuple[Path, str]:
    """The newest whole checkpoint of an output folder that this run can go on from; says which were skipped, and why.

    Args:
        run: the output folder.
        unlike: what keeps this run from going on from a checkpoint with this document; empty for nothing.

    Returns:
        The checkpoint, and an empty text; or the newest whole one and what keeps the run from it.

    Raises:
        FolderError: there is no whole checkpoint.
    """
    other: tuple[Path, str] | None = None
    skipped = []
    for folder in sorted(run.glob("checkpoint-*"), key=step_of, reverse=True):
        try:
            if step_of(folder) < 0:
                raise FolderError(message("not named like a checkpoint", where=str(folder)))
            why = unlike(verify(folder))
        except FolderError as fault:
            skipped.append(f"skipped {folder.name}: {fault}")
            continue
        if not why:
            for line in skipped:
                logger.warning(line)
            return folder, ""
        other = other or (folder, why)
        skipped.append(f"skipped {folder.name}, of another run: {why}")
    if other is not None:
        return other
    raise FolderError(
        message(
            "no whole checkpoint to resume from",
            where=str(run),
            found="; ".join(skipped) or "no checkpoint",
            remedy="Train from the start.",
        )
    )


def rotate(folder: Path, run: str, keep: int | None, best: str | None) -> None:
    """Delete this run's older checkpoints beyond `keep`, never the best one and nothing that the run did not write.

    Raises:
        DiskError: the disk does not let one go.
    """
    if not keep:
        return
    named = (entry for entry in folder.glob("checkpoint-*") if step_of(entry) >= 0)
    ours = sorted((entry for entry in named if run_of(entry) == run), key=step_of)
    others = [entry for entry in ours if str(entry) != best]
    room = max(1, keep - (len(ours) - len(others)))
    remedy = "The newer checkpoints are whole. Delete this one, then go on with resume_from_checkpoint=True (--resume)."
    for entry in others[:-room]:
        with disk.writing(entry, remedy):
            _discard(entry)
