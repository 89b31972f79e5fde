"""What one process of a run computes for all those of its machine: the first does it, the others wait for it.

They need not all ask, nor in any order, and one that dies keeps nobody waiting: its lock goes with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adapters import jsontext, locks, places, processes, shards

KEPT = 24 * 3600  # seconds after which what was kept for a run is deleted by another


def on_machine(what: Any, files: Iterable[Path], act: Callable[[], Any]) -> Any:
    """What `act` gives, computed once for all processes of this run on this machine; plain data, lists for tuples.

    It is taken from another process only of the same launch, and only while the files are the very same.

    Args:
        what: tells it from other things that are computed; plain data.
        files: that it is computed from.
        act: computes it.
    """
    if processes.count() == 1:
        return act()
    launch = [os.getppid(), *(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))]
    try:
        seen = [[str(file), *_state(file.stat())] for file in sorted(set(files))]
        folder = places.cache_folder() / "holdfast" / "once"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return act()  # nowhere to leave it
    place = folder / f"{shards.digest_of({'launch': launch, 'files': seen, 'what': what})}.json"
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.alone(place.with_suffix(".lock"), wait=True))
        except OSError:
            return act()  # a file system without locks
        if place.is_file():
            return jsontext.parse(place.read_bytes())
        found = act()
        fresh = place.with_suffix(f".{os.getpid()}")
        fresh.write_text(json.dumps(found), encoding="utf-8")
        fresh.replace(place)
    _tidy(folder)
    return jsontext.parse(json.dumps(found).encode())


def _state(found: os.stat_result) -> list[int]:
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def _tidy(folder: Path) -> None:
    """Delete what runs of yesterday have left."""
    for file in folder.iterdir():
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > KEPT:
                file.unlink()
