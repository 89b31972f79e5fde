"""`adapters inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Folder, Json, Picture, out
from adapters.errors import RequestError, message


def inspect(
    folder: Folder,
    changes: Annotated[
        bool, typer.Option("--changes", help="What it changes, tensor by tensor: norms, ranks, shares of the backbone.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="With --changes: the backbone's folder, where it is not the one named.")
    ] = None,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """What an adapter is: backbone, strategy, what trained, bytes, metrics. Checks every digest."""
    from adapters.inspection import describe, lines
    from adapters.manifest import fetch

    if not changes:
        if base or picture:
            raise RequestError(
                message("--base and --picture are for --changes", where="inspect", remedy="Say --changes.")
            )
        facts = describe(fetch(folder))
        if as_json:
            out(facts)
        else:
            print("\n".join(lines(facts)))
        return
    from adapters import heatmap
    from adapters.progress import Job

    if picture:
        heatmap.check(picture)
    with Job("importing torch"):
        from adapters.profile import inspect as measured

    found = measured(folder, base=base)
    file = found.picture(picture) if picture else None
    if as_json:
        out({**found.to_json(), "picture": str(file) if file else None})
        return
    print("\n".join([*lines(found.facts), "", *found.lines()]))
    if file:
        print(f"\npicture   {file}")
