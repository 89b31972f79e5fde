"""`adapters inspect`."""

from __future__ import annotations

from adapters.console import Folder, Json, out


def inspect(folder: Folder, as_json: Json = False) -> None:
    """What an adapter is: backbone, strategy, what trained, bytes, metrics. Checks every digest."""
    from adapters.inspection import describe, lines
    from adapters.manifest import fetch

    found = describe(fetch(folder))
    if as_json:
        out(found)
    else:
        print("\n".join(lines(found)))
