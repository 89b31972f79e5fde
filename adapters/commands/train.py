"""`adapters train`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.console import STRATEGY_NAMES, TASK_NAMES, Json, out, pairs, say
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from adapters.recipe import Recipe


def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe in YAML; options go over what it says.")] = None,
    model: Annotated[str | None, typer.Option(help="Id or folder of the backbone.")] = None,
    data: Annotated[
        str | None, typer.Option(help="csv, tsv, json, jsonl, parquet, a folder of them, or a hub id.")
    ] = None,
    task: Annotated[str | None, typer.Option(help=f"What the model is for: {TASK_NAMES}.")] = None,
    strategy: Annotated[str | None, typer.Option(help=f"What trains: {STRATEGY_NAMES}.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the finished adapter.")] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="Any recipe key: options.r=16, train.learning_rate=1e-4, seed=1.")
    ] = None,
    columns: Annotated[
        list[str] | None, typer.Option("--column", help="task column=data column, e.g. text=review.")
    ] = None,
    resume: Annotated[bool | None, typer.Option(help="Go on with an interrupted run, or forget it.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="With --resume: what is meant to differ from the interrupted run.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an adapter: from a recipe, or from options alone."""
    from adapters.recipe import Recipe, changed

    named = {"model": model, "data": data, "task": task, "strategy": strategy, "output": output}
    changes = {key: value for key, value in named.items() if value is not None} | pairs(assign or [], "--set")
    for wanted, found in pairs(columns or [], "--column").items():
        changes[f"columns.{wanted}"] = str(found)
    if recipe is not None and not recipe.endswith((".yaml", ".yml")) and not Path(recipe).is_file():
        raise RequestError(
            message("not a recipe", where=recipe, expected="a file in YAML", remedy="A backbone is given as --model.")
        )
    plan = Recipe.read(recipe, changes) if recipe is not None else Recipe.make(changed({}, changes), "options")
    onward = shlex.join(["adapters", *(word for word in sys.argv[1:] if word not in ("--resume", "--no-resume"))])
    results = plan.run(say, resume=resume, override=override or [], onward=f"{onward} --resume")
    if as_json:
        out(results)
        return
    metric = results["metric"]
    print(f"saved     {results['output']} ({results['adapter_bytes'] / 1e6:.2f} MB)")
    if "test" in results:
        print(
            f"test      {metric} {results['test'][metric]:.4f} (majority {results['majority'][metric]:.4f}, "
            f"untrained {results['untrained'][metric]:.4f})"
        )
        if not results["beat_baseline"]:
            print("warning   the run did not beat its baselines")
    print(f"next      adapters predict {results['output']} {_example(results['task'], plan)}")


def _example(task: str, plan: Recipe) -> str:
    """What stands for a row in the line that says how to go on: a text, or where that is not enough the rows."""
    from adapters.adapt import task_class

    if str(next(iter(task_class(task).columns))) in ("text", "tokens", "source"):
        return "'a text'"
    data = plan.data if isinstance(plan.data, str) else plan.data.get("test", next(iter(plan.data.values())))
    renamed = [f"--column {shlex.quote(f'{wanted}={found}')}" for wanted, found in plan.columns.items()]
    return " ".join(["--data", shlex.quote(data), *renamed])
