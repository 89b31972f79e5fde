"""Places of files: which names are paths here, which entries of a folder lead out of it, where caches lie."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from adapters.errors import FolderError, message


def is_path(name: str) -> bool:
    """Whether a name can only be a place on this machine: it never becomes a look-up on the hub.

    `runs/one` is read as a place where there is a folder `runs`, and as a name of the hub elsewhere.
    """
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name:
        return True
    return "/" in name and Path(name).parent.is_dir()


def lies_inside(name: str) -> bool:
    """Whether a relative name in the form of a URL stays below the folder that it belongs to."""
    parts = name.split("/")
    return name.isprintable() and not any(p in ("", ".", "..") or "\\" in p or ":" in p for p in parts)


def refuse_strays(folder: Path, *, deep: bool) -> None:
    """Refuse links, and whatever is neither a file nor a folder: reading them would read something else.

    The hub's cache keeps each file of a snapshot as a link to a blob of the same repository; these are followed.

    Args:
        folder: the folder; it may itself be reached by a link.
        deep: look into folders below it too; else only at its files.

    Raises:
        FolderError: naming the entry.
    """
    root = folder.resolve()
    snapshots = next((p for p in (root.parent, root.parent.parent) if p.name == "snapshots"), None)  # or a folder in it
    blobs = snapshots.parent / "blobs" if snapshots is not None else None
    for entry in sorted(root.rglob("*") if deep else root.iterdir()):
        if entry.is_dir() and (not deep or not entry.is_symlink()):
            continue
        if entry.is_symlink():
            if blobs is None or entry.resolve().parent != blobs or not entry.is_file():
                raise FolderError(
                    message(
                        "a link in a folder that is to be read",
                        where=str(folder / entry.relative_to(root)),
                        expected="a file",
                        found=f"a link to {entry.readlink()}",
                        remedy="Put the file itself there, or give the folder that holds it.",
                    )
                )
        elif not entry.is_file():
            raise FolderError(message("neither a file nor a folder", where=str(folder / entry.relative_to(root))))


def refuse_taken(target: Path, ours: Callable[[Sequence[str]], bool], expected: str) -> None:
    """Refuse an output folder that holds something that is not ours to replace.

    Args:
        target: the folder that is to be written.
        ours: whether the folder, with these names in it, is of our making.
        expected: what it may be, for the message.

    Raises:
        FolderError: with what was found.
    """
    if "\0" in str(target):
        raise FolderError(message("no name of a folder", where=repr(str(target))))
    below = next((parent for parent in target.parents if parent.exists()), None)
    if below is not None and not below.is_dir():
        raise FolderError(message("the output lies below a file", where=str(target), found=f"{below} is no folder"))
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise FolderError(message("the output is not a folder", where=str(target), remedy="Give another output."))
    content = sorted(entry.name for entry in target.iterdir())
    if content and not ours(content):
        raise FolderError(
            message(
                "the output folder already holds something else",
                where=str(target),
                expected=expected,
                found=", ".join(content[:5]),
                remedy="Give another output.",
            )
        )


def cache_folder() -> Path:
    """Where this user's caches lie, as the platform has it; looked up whenever it is asked for.

    Raises:
        RuntimeError: the user has no home.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):  # the XDG rules say to ignore any other
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path.home() / ".cache"
