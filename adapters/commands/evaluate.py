"""`adapters evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Backbone, Columns, Folder, Json, out, renamed, say
from adapters.progress import Job


def evaluate(
    folder: Folder,
    data: Annotated[str, typer.Option(help="Labelled rows.")],
    model: Backbone = None,
    columns: Columns = None,
    as_json: Json = False,
) -> None:
    """Metrics of an adapter on labelled rows (the test part, where the data has parts)."""
    with Job("importing torch"):
        from adapters.portions import labelled
        from adapters.predict import evaluate as measure
        from adapters.storage import load

    adapted = load(folder, model)
    part, rows = labelled(data, renamed(columns), adapted.task, say)
    numbers = measure(adapted, rows)
    if as_json:
        out({"rows": len(rows), "split": part, **numbers})
        return
    width = max(map(len, numbers)) + 2
    print(f"{'rows':{width}}{len(rows):>10}")
    for name, value in numbers.items():
        print(f"{name:{width}}{value:>10.4f}")
