"""Recipes as programs: `run_recipe(RECIPE)` at the end of a script is `adapters train` with that recipe in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapters import cli
from adapters.commands.train import train
from adapters.errors import RequestError, message, nearest
from adapters.recipe import Recipe, changed


def run_recipe(recipe: Recipe | None = None, **recipes: Recipe) -> None:
    """Run a recipe with the options of `adapters train` from the command line, and print what that prints.

    A script that ends in this line takes `--set key=value` and every other option, and ends with the command's exit
    codes. Several recipes run one after the other; each has a name, and `--set name.key=value` says whose key is
    meant. All of them are checked before the first one runs; `--resume`, and a launcher that starts the script again,
    leave out those that are finished.

    Args:
        recipe: the script's only recipe.
        **recipes: or several by name, in the order in which they run.

    Raises:
        SystemExit: something is wrong with a request, the data or the numbers; one line on standard error says what.
        RequestError: called with nothing, or with one recipe beside named ones.
    """
    if (recipe is None) == (not recipes):
        raise RequestError(
            message("which recipe is to run?", where="run_recipe", expected="one recipe, or several by name")
        )
    program = cli.single(train)
    cli.ran(program, sys.argv[1:], Path(sys.argv[0]).name, recipes_with(recipe, recipes))


def recipes_with(recipe: Recipe | None, recipes: Mapping[str, Recipe]) -> Callable[[Mapping[str, Any]], list[Recipe]]:
    """What makes the recipes that run of the changes on the command line.

    Args:
        recipe, recipes: as `run_recipe` takes them.

    Returns:
        A function of "key" or "section.key" -> value (with a recipe's name before it where there are several). It
        raises RequestError for a key that is nobody's, or that does not say whose it is.
    """

    def made(changes: Mapping[str, Any]) -> list[Recipe]:
        if recipe is not None:
            return [_changed(recipe, changes, "options")]
        own: dict[str, dict[str, Any]] = {name: {} for name in recipes}
        faults = []
        for key, value in changes.items():
            name, _, rest = key.partition(".")
            if name in own and rest:
                own[name][rest] = value
            elif name in Recipe.model_fields:
                choices = " or ".join(f"{other}.{key}" for other in recipes)
                faults.append(message(f"whose {key!r} is meant", where="--set", remedy=f"Say {choices}."))
            else:
                faults.append(message(f"no recipe {name!r} is here", where=f"--set {key}", remedy=nearest(name, own)))
        if faults:
            raise RequestError(" ".join(faults))
        return [_changed(recipes[name], own[name], name) for name in own]

    return made


def _changed(recipe: Recipe, changes: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with some keys set; what it left at its default stays left out."""
    return Recipe.make(changed(recipe.model_dump(exclude_unset=True), changes), where) if changes else recipe
