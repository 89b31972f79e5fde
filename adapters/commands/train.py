"""`adapters train`."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.console import STRATEGY_NAMES, TASK_NAMES, Json, forget, out, pairs, say
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from adapters.recipe import Recipe


def train(
    context: typer.Context,
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
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read the rows, show what the run would take, train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter: from a recipe, or from options alone."""
    from adapters import completed, exchange, launch, processes, ranks

    several = launch.unstarted()
    if several > 1:
        say(f"accelerate launch --cpu starts one process: torchrun starts {several} of them now")
        launch.hand_over(several)
    if dry_run and not ranks.first():
        return
    plans: list[Recipe] = []
    with contextlib.nullcontext() if dry_run else exchange.agreeing():
        try:
            named = {"model": model, "data": data, "task": task, "strategy": strategy, "output": output}
            changes = {key: value for key, value in named.items() if value is not None}
            changes |= pairs(assign or [], "--set")
            for wanted, found in pairs(columns or [], "--column").items():
                changes[f"columns.{wanted}"] = str(found)
            plans = _plans(context.obj, recipe, changes)
        finally:
            if not dry_run:  # before anybody leaves with a fault that all have
                ranks.join(plans[0].train.get("ddp_timeout") if plans else None)
    program = ["adapters"] if context.obj is None else ["python", sys.argv[0]]
    onward = shlex.join(launch.onward([*program, *sys.argv[1:]]))
    several = processes.count()
    if dry_run:
        processes.alone()
    # One recipe alone is done again where somebody asks for it; a launcher that starts it again does not ask.
    for plan in completed.left(plans, say, resume=resume if len(plans) > 1 else None):
        forget()
        if dry_run:
            _dry(plan, several, as_json=as_json)
            continue
        results = plan.run(say, resume=resume, override=override or [], onward=onward)
        if not ranks.first():
            continue
        if as_json:
            out(results)
        else:
            _print(results, plan)


def _plans(
    script: Callable[[Mapping[str, Any]], list[Recipe]] | None, recipe: str | None, changes: Mapping[str, Any]
) -> list[Recipe]:
    """The recipes that run: those of a script, or the one of a file or of options alone."""
    from adapters.recipe import Recipe, changed

    if recipe is not None and not recipe.endswith((".yaml", ".yml")) and not Path(recipe).is_file():
        raise RequestError(
            message("not a recipe", where=recipe, expected="a file in YAML", remedy="A backbone is given as --model.")
        )
    if script is not None:  # a script's own recipes
        if recipe is not None:
            raise RequestError(message("two recipes", where=recipe, expected="options: the script is the recipe"))
        return script(changes)
    return [Recipe.read(recipe, changes) if recipe is not None else Recipe.make(changed({}, changes), "options")]


def _dry(plan: Recipe, several: int, *, as_json: bool) -> None:
    """What a run would take, and each of its processes where there are several."""
    from adapters.recipe import Recipe, changed

    if several > 1:
        from adapters import team

        say(team.shares(plan.train, several) + "; the plan is of one of them")
        plan = Recipe.make(
            changed(plan.model_dump(exclude_unset=True), {"train": team.divided(plan.train, several)}), ""
        )
    needed = plan.plan(say)
    if as_json:
        out(needed.to_json())
    else:
        print(needed)


def _print(results: Mapping[str, Any], plan: Recipe) -> None:
    """What was saved, how good it is, and what to type next."""
    metric = results["metric"]
    print(f"saved     {results['output']} ({results['adapter_bytes'] / 1e6:.2f} MB)")
    if "test" in results:
        print(
            f"test      {metric} {results['test'][metric]:.4f} (majority {results['majority'][metric]:.4f}, "
            f"untrained {results['untrained'][metric]:.4f})"
        )
        if not results["beat_baseline"]:
            print("warning   the run did not beat its baselines")
    if results.get("report"):
        print(f"report    {results['report']}")
    if "merged" in results:
        print(f"merged    {results['merged']}")
    print(f"next      adapters predict {results['output']} {_example(results['task'], plan)}")


def _example(task: str, plan: Recipe) -> str:
    """What stands for a row in the line that says how to go on: a text, or where that is not enough the rows."""
    from adapters.adapt import task_class

    if str(next(iter(task_class(task).columns))) in ("text", "tokens", "source"):
        return "'a text'"
    data = plan.data.get("test", next(iter(plan.data.values()))) if isinstance(plan.data, dict) else plan.data
    data = data if isinstance(data, str) else data[0]
    renamed = [f"--column {shlex.quote(f'{wanted}={found}')}" for wanted, found in plan.columns.items()]
    return " ".join(["--data", shlex.quote(data), *renamed])
