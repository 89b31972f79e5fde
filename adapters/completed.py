"""Recipes that are done already: what they leave is there, made by the same recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from adapters import journal, manifest, ranks, restarts
from adapters.recipe import Recipe


def left(recipes: Sequence[Recipe], say: Callable[[str], None], *, resume: bool | None) -> list[Recipe]:
    """The recipes that are still to run; all processes of a launch call this, and the first one looks.

    Left out are, with `resume`, those whose folders are there; in a launch that its launcher has started again, those
    that this very launch has done, whatever lay there before.

    Args:
        recipes: in the order in which they run.
        say: takes a line on each that is left out.
        resume: interrupted work goes on.
    """
    again = restarts.Again.asked()

    def looked() -> list[int]:
        todo = []
        for number, recipe in enumerate(recipes):
            done = resume or restarts.made(_folder(recipe) / journal.FILE, again)
            if done and _finished(recipe):
                say(f"{recipe.output}: finished already, it was made by this very recipe")
            else:
                todo.append(number)
        return todo

    todo: list[int] = ranks.told(ranks.by_first(looked))
    return [recipes[number] for number in todo]


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.output).expanduser()


def _finished(recipe: Recipe) -> bool:
    """Whether the folders that a recipe makes are there, made by the same recipe."""
    file = _folder(recipe) / manifest.RECIPE
    if not file.is_file() or (recipe.merge is not None and not Path(recipe.merge).expanduser().is_dir()):
        return False
    return Recipe.read(file).model_dump() == recipe.model_dump()
