"""`adapters validate`."""

from __future__ import annotations

from typing import Annotated

import typer

from adapters.console import Json, out, pairs, spoken


def validate(
    recipe: Annotated[str, typer.Argument(help="A recipe in YAML.")],
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe key, as for train: options.r=16, seed=1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find every fault of a recipe and its data, before anything is loaded. Exit code 2: recipe, 3: data."""
    from adapters.validation import validate as look

    report = look(recipe, pairs(assign or [], "--set"))
    if as_json:
        out(report.to_json())
    else:
        print("\n".join(map(spoken, report.lines())))
    if report.exit_code:
        raise typer.Exit(report.exit_code)
