"""`adapters report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.console import Backbone, Columns, Folder, Json, out, renamed, say


def report(
    folder: Folder,
    data: Annotated[str | None, typer.Option(help="Labelled rows to measure and to show answers of.")] = None,
    model: Backbone = None,
    columns: Columns = None,
    rows: Annotated[bool, typer.Option(help="Show texts and pictures of rows, or leave them out.")] = True,
    as_json: Json = False,
) -> None:
    """Write an adapter's report.html again; with --data about these rows (their test part, where they have parts)."""
    from adapters import report as page
    from adapters.manifest import fetch

    place = fetch(folder)
    found: dict[str, Any] | None = None
    if data is not None:
        from adapters.portions import labelled
        from adapters.predict import measure
        from adapters.storage import load

        adapted = load(folder, model)
        _, raw = labelled(data, renamed(columns), adapted.task, say)
        measured = measure(adapted, raw)
        source = {"source": Path(data).name, "numbers": measured.numbers}
        found = {**page.findings(adapted, measured, raw), **source}
    file = page.write(place, found, rows=rows)
    if as_json:
        out({"report": str(file)})
    else:
        print(f"report    {file}")
