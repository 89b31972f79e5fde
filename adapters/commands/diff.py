"""`adapters diff`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Columns, Json, Picture, out, renamed, say
from adapters.progress import Job


def diff(
    a: Annotated[str, typer.Argument(help="An adapter folder or the id of one; or a transformers folder.")],
    b: Annotated[str, typer.Argument(help="Another of the same kind.")],
    base: Annotated[str | None, typer.Option(help="The backbone's folder, where it is not the one named.")] = None,
    data: Annotated[str | None, typer.Option(help="Rows that both are to answer.")] = None,
    columns: Columns = None,
    picture: Picture = None,
    as_json: Json = False,
) -> None:
    """What tells two adapters apart: manifests, what each changes of the backbone, answers. Or two checkpoints."""
    from adapters import heatmap

    if picture:
        heatmap.check(picture)
    with Job("importing torch"):
        from adapters.diff import diff as compared

    found = compared(a, b, base=base, rows=data, columns=renamed(columns), say=say)
    file = found.picture(picture) if picture else None
    if as_json:
        out({**found.to_json(), "picture": str(file) if file else None})
        return
    print("\n".join(found.lines()))
    if file:
        print(f"\npicture   {file}")
