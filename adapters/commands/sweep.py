"""`adapters sweep`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer

from adapters.console import Json, out, pairs, say


def sweep(
    file: Annotated[str, typer.Argument(help="A sweep or a recipe in YAML.")],
    over: Annotated[
        list[str] | None,
        typer.Option(help="What varies: strategy=probe,lora; options.r=4,8; train.learning_rate=1e-5..1e-3 (a range)."),
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="How many seeds (3), or which (0,7,9); the split stays.")] = None,
    search: Annotated[str | None, typer.Option(help="grid (unless another is named), random, optuna.")] = None,
    trials: Annotated[int | None, typer.Option(help="How many settings random or optuna try.")] = None,
    limit: Annotated[int | None, typer.Option(help="The most trials; of a larger grid so many are drawn.")] = None,
    metric: Annotated[str | None, typer.Option(help="What chooses, on the validation rows.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of table, picture and the best adapter.")] = None,
    keep: Annotated[str | None, typer.Option(help="Which adapters stay at the end: best (or all).")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Any key of the recipe, as in adapters train.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what failed.")] = False,
    as_json: Json = False,
) -> None:
    """Try many settings over one backbone: one table, one picture, the best adapter; goes on where it was."""
    from adapters import axes
    from adapters.outcome import page
    from adapters.sweep import Sweep
    from adapters.yamltext import parse_yaml

    varied = dict(axes.parse(entry) for entry in over or [])
    numbers: Any = None if seeds is None else parse_yaml(f"[{seeds}]", "--seeds")
    if isinstance(numbers, list) and len(numbers) == 1:
        numbers = numbers[0]
    plan = Sweep.read(
        file,
        varied,
        pairs(assign or [], "--set"),
        seeds=numbers,
        search=search,
        trials=trials,
        limit=limit,
        metric=metric,
        output=output,
        keep=keep,
    )
    results = plan.run(say, retry=retry, onward=shlex.join(["adapters", *sys.argv[1:]]))
    if as_json:
        out(results)
        return
    print(page(results), end="")
    print(f"Table, picture and numbers: {results['output']}/sweep.md, .csv, .json, .png, .svg")
