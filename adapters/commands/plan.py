"""`adapters plan`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from adapters.console import STRATEGY_NAMES, TASK_NAMES, Json, out, pairs


def plan(
    model: Annotated[
        str, typer.Argument(help="Id or folder of the backbone (its config.json is enough), or a recipe.")
    ],
    strategy: Annotated[
        str | None, typer.Option(help=f"One, or several with commas; left out: all. {STRATEGY_NAMES}.")
    ] = None,
    task: Annotated[str | None, typer.Option(help=f"What the model is for: {TASK_NAMES}.")] = None,
    labels: Annotated[int | None, typer.Option(help="How many labels a classifier tells apart.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of a training batch.")] = None,
    rows: Annotated[
        int | None, typer.Option(help="Training rows: what is kept of the frozen part grows with them.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help='A card ("rtx 4090"), cuda or cpu; left out: what is here.')
    ] = None,
    memory: Annotated[str | None, typer.Option(help="What must hold it: 24GB, 80GiB.")] = None,
    processes: Annotated[int, typer.Option(help="Processes that share the work, each on a device of its own.")] = 1,
    sharding: Annotated[
        str | None,
        typer.Option(
            help="Their engine: ddp (the model whole in each), fsdp (divided), zero (its optimizer divided, by "
            "DeepSpeed); left out: the first two."
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any recipe key: options.r=16, train.optim=sgd, load.dtype=bfloat16."),
    ] = None,
    as_json: Json = False,
) -> None:
    """What training would take: memory, file sizes, what fits a GPU. Reads no weights and trains nothing."""
    from adapters.console import say
    from adapters.hardware import of_recipe
    from adapters.plan import every
    from adapters.recipe import Recipe, changed

    named = {"task": task, "model": None if model.endswith((".yaml", ".yml")) else model}
    changes = {key: value for key, value in named.items() if value is not None} | pairs(assign or [], "--set")
    if batch is not None:
        changes["train.per_device_train_batch_size"] = batch
    if model.endswith((".yaml", ".yml")):
        document = Recipe.read(model, changes).model_dump(exclude_unset=True)
    else:
        document = changed({"task": "text-classification"}, changes)
    chosen = [name.strip() for name in strategy.split(",")] if strategy else None
    if chosen is None and not model.endswith((".yaml", ".yml")):
        chosen = every()
    sizes: dict[str, Any] = {"labels": labels, "rows": rows, "length": length, "device": device, "memory": memory}
    sizes |= {"processes": processes, "sharding": sharding}
    found = of_recipe(document, chosen[0] if chosen and len(chosen) == 1 else chosen, **sizes, say=say)
    if as_json:
        out(found.to_json())
    else:
        print(found)
