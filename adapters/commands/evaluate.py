"""`adapters evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Folder, Json, out, pairs, say
from adapters.progress import Job


def evaluate(
    folder: Folder,
    data: Annotated[str, typer.Option(help="Labelled rows.")],
    model: Annotated[
        str | None, typer.Option(help="The backbone, where it is not the one that the adapter names.")
    ] = None,
    columns: Annotated[list[str] | None, typer.Option("--column", help="task column=data column.")] = None,
    as_json: Json = False,
) -> None:
    """Metrics of an adapter on labelled rows (the test part, where the data has parts)."""
    with Job("importing torch"):
        from adapters.data import read
        from adapters.formats import arrange
        from adapters.predict import evaluate as measure
        from adapters.storage import load

    adapted = load(folder, model)
    splits = read(data, say)
    part = "test" if "test" in splits else "train"
    renamed = {k: str(v) for k, v in pairs(columns or [], "--column").items()}
    rows, remark = arrange(splits[part], renamed, adapted.task.columns)
    if remark:
        say(f"{part}: {remark}")
    numbers = measure(adapted, rows)
    if as_json:
        out({"rows": len(rows), "split": part, **numbers})
        return
    width = max(map(len, numbers)) + 2
    print(f"{'rows':{width}}{len(rows):>10}")
    for name, value in numbers.items():
        print(f"{name:{width}}{value:>10.4f}")
