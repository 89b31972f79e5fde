"""What the processes of one run share: they read the same rows, and divide those of a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapters import exchange, identity, portions, processes, ranks
from adapters.inflow import Inflow

if TYPE_CHECKING:
    from adapters.contracts import Task

SHARED = ("per_device_train_batch_size", "gradient_accumulation_steps")


def drawn(recipe: portions.Asked, say: Callable[[str], None]) -> tuple[portions.Parts, Task, dict[str, Any], list[str]]:
    """The rows of a recipe in every process: the first reads them, downloads and all, and then the others do.

    Args, returns and errors are those of `portions.drawn`.

    Raises:
        RequestError: the rows are not the same in all processes.
    """
    found = ranks.by_first(lambda: portions.drawn(recipe, say))
    with exchange.agreeing():
        if found is None:
            found = portions.drawn(recipe, lambda line: None)
    if processes.count() > 1:
        prints = {
            name: rows.fingerprint() if isinstance(rows, Inflow) else identity.fingerprint(rows)
            for name, rows in found[0].items()
        }
        exchange.alike(
            {f"the {name} rows": print["sha256"] for name, print in prints.items()},
            str(recipe.data),
            "Each machine reads its own copy: bring the same rows to all, or a folder that all of them see.",
        )
    return found


def divided(train: Mapping[str, Any], several: int) -> dict[str, Any]:
    """Training settings as each of several processes takes them: the rows of a step stay those of one process.

    Args:
        train: a recipe's, whose rows a step are those of all processes together.
        several: processes.

    Raises:
        RequestError: they do not divide.
    """
    from adapters.arguments import HOUSE

    given = {SHARED[0]: HOUSE[SHARED[0]], SHARED[1]: 1, **train}
    rows, accumulated = given[SHARED[0]], given[SHARED[1]]
    if several == 1 or not all(isinstance(value, int) and value > 0 for value in (rows, accumulated)):
        return dict(train)  # what is no number is refused with all other settings
    at_once, passes = processes.share(rows, accumulated, several)
    return {**train, SHARED[0]: at_once, SHARED[1]: passes}


def shares(train: Mapping[str, Any], several: int) -> str:
    """The same in words: what each process takes of a step."""
    each = divided(train, several)
    at_once, passes = each[SHARED[0]], each[SHARED[1]]
    often = f" in {passes} passes of {at_once}" if passes > 1 else ""
    step = at_once * passes * several
    return f"{several} processes: a step of {step} rows, each process takes {at_once * passes} of them{often}"
