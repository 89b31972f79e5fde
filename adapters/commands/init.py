"""`adapters init`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapters.console import STRATEGY_NAMES, TASK_NAMES, Json, out, pairs, say

TASKS_ALONE = TASK_NAMES.replace(" (unless another is named)", "")


def init(
    data: Annotated[
        list[str], typer.Option(help="Your rows: a file, pattern, folder or hub id; several as --data train=a.csv.")
    ],
    task: Annotated[str | None, typer.Option(help=f"Left out: found from the columns. {TASKS_ALONE}.")] = None,
    model: Annotated[str | None, typer.Option(help="Id or folder of the backbone; left out: a small one.")] = None,
    strategy: Annotated[str, typer.Option(help=f"{STRATEGY_NAMES}.")] = "lora",
    output: Annotated[str, typer.Option(help="The recipe to write.")] = "recipe.yaml",
    adapter: Annotated[
        str | None, typer.Option(help="Where the adapter goes; left out: out/ and the data's name.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="task column=data column, where the names do not tell.")
    ] = None,
    streamed: Annotated[
        bool, typer.Option("--streaming", help="The training rows are to be read as they are needed.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Look at your rows and write a recipe that runs as it is, each choice with its reason."""
    from pathlib import Path

    from adapters.drafting import draft, write
    from adapters.errors import FolderError, message

    if Path(output).exists() and not force:
        remedy = "Take another name with --output, or say --force to replace it."
        raise FolderError(message("the file is there already", where=output, remedy=remedy))
    named = {key: str(value) for key, value in pairs(columns or [], "--column").items()}
    chosen: dict[str, Any] = {"task": task, "model": model, "strategy": strategy, "output": adapter}
    made = draft(data, **chosen, columns=named, streamed=streamed, file=output, say=say)
    write(made, output, force=force)
    if as_json:
        out({"file": output, "recipe": dict(made.recipe), "choices": list(made.choices)})
        return
    for choice in made.choices:
        name, _, text = choice.partition(": ")
        print(f"{name:<14}{text}")
    print(f"{'wrote':<14}{output}")
    print(f"{'next':<14}adapters validate {output}")
