"""Which processes of a run have a disk in common: found out by a file of each, never by what they are called."""

from __future__ import annotations

import contextlib
import secrets
from pathlib import Path

from adapters import ranks


def sharing(folder: Path | None) -> list[int]:
    """The numbers of the processes that see each other's files in a folder, this one among them.

    Called by all processes or by none.

    Args:
        folder: made where it is not there; None, or one that cannot be written to, is shared with nobody.
    """
    number = ranks.rank()
    name: str = ranks.told(secrets.token_hex(8))
    probe = folder / f".{name}.{number}" if folder is not None else None
    seen: list[int] = []
    if probe is not None:
        with contextlib.suppress(OSError):
            probe.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            probe.touch()
    ranks.wait()
    if probe is not None and probe.exists():
        seen = sorted(int(file.suffix[1:]) for file in probe.parent.glob(f".{name}.*"))
    heard: list[list[int]] = ranks.gathered(seen)
    if probe is not None:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    agreed: list[bool] = ranks.gathered(bool(seen) and all(heard[other] == seen for other in seen))
    return seen if seen and all(agreed[other] for other in seen) else [number]
