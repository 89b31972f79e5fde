"""What the processes of one run share: recipe, rows and backbone are the same, the rows of a step are divided."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from adapters import identity, portions, processes, ranks
from adapters.errors import RequestError, message

if TYPE_CHECKING:
    from datasets import Dataset

    from adapters.contracts import Task

SHARED = ("per_device_train_batch_size", "gradient_accumulation_steps")


def same(what: str, value: Any, where: str) -> None:
    """Refuse a run whose processes do not have the same at hand; every process calls this.

    Args:
        what: in words.
        value: plain data that tells one from another.
        where: it came from.

    Raises:
        RequestError: in all processes, naming the ones that differ from the first.
    """
    said = ranks.gathered(hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest())
    others = [number for number, digest in enumerate(said) if digest != said[0]]
    with ranks.together():
        if others:
            raise RequestError(
                message(
                    f"not all processes of the run have the same {what}",
                    where=where,
                    expected=f"that of rank 0 (sha256 {said[0][:12]}) everywhere",
                    found="others on "
                    + ", ".join(f"rank {number} (sha256 {said[number][:12]})" for number in others[:8]),
                    remedy="Each machine reads its own copy: bring the same to all, or a folder that all of them see.",
                )
            )


def drawn(
    recipe: portions.Asked, say: Callable[[str], None]
) -> tuple[dict[str, Dataset], Task, dict[str, Any], list[str]]:
    """The rows of a recipe in every process: the first reads them, downloads and all, and then the others do.

    Args, returns and errors are those of `portions.drawn`.

    Raises:
        RequestError: the rows are not the same in all processes.
    """
    found = ranks.by_first(lambda: portions.drawn(recipe, say))
    with ranks.together():
        if found is None:
            found = portions.drawn(recipe, lambda line: None)
    if processes.count() > 1:
        prints = {name: identity.fingerprint(rows) for name, rows in found[0].items()}
        same("rows", prints, str(recipe.data))
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
