"""What a sweep tries: settings, each a recipe and a seed, and the file in which a trial's result stands.

Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, final

from adapters import axes, shards
from adapters.adapt import row_of, task_class
from adapters.axes import Axis
from adapters.errors import FolderError, RequestError, message, nearest
from adapters.options import ALIASES, field_names
from adapters.recipe import KEY_ALIASES, Recipe, changed

RESULT: Final = "result.json"
FORMAT: Final = 1
MAX_RESULT: Final = 1 << 20  # bytes
STEPS: Final = ("learning_rate", "num_train_epochs", "max_steps")  # settings of steps, which a solved strategy lacks
# Keys whose change would make two settings answer different questions.
FIXED: Final = ("data", "streaming", "columns", "labels", "task", "validation", "test", "limit", "split_seed")


@final
@dataclass(frozen=True)
class Setting:
    """One combination that is tried, once for each seed.

    Attributes:
        values: by the sweep's own keys, those left out that do not apply to its strategy.
        recipe: with these values.
        solved: its strategy's answer is solved, unless steps are asked for: the probe.
    """

    values: Mapping[str, Any]
    recipe: Recipe
    solved: bool

    def __str__(self) -> str:
        return axes.told(self.values)

    @property
    def key(self) -> str:
        """What tells it from other settings of the sweep."""
        return json.dumps(dict(self.values), default=str)

    def seeded(self, seed: int, *, split: bool) -> Recipe:
        """Its recipe with another seed; the rows stay divided as they are, unless the split moves too."""
        base = self.recipe
        division = base.seed if base.split_seed is None else base.split_seed
        moved = {"seed": seed, "split_seed": None if split or seed == division else division}
        return base.model_copy(update=moved)


@final
@dataclass(frozen=True)
class Space:
    """Everything that settings are made of.

    Attributes:
        recipe: what all have in common.
        over: what varies.
    """

    recipe: Recipe
    over: tuple[Axis, ...]

    @property
    def strategies(self) -> tuple[str, ...]:
        """The strategies that take part."""
        return next(
            (tuple(map(str, one.values)) for one in self.over if one.key == "strategy"), (self.recipe.strategy,)
        )

    def check(self) -> list[str]:
        """Look at every key; returns what is to be said of those that do not apply everywhere.

        Raises:
            RequestError: every key at fault, with the right names.
        """
        faults = [fault for one in self.over if (fault := self._fault(one))]
        if self.recipe.streaming:
            what = "a sweep over a stream: its trials share rows that are read once"
            remedy = "Sweep over a file of some of the rows, then train its best recipe with streaming: true."
            faults.append(message(what, where="recipe: streaming", remedy=remedy))
        if faults:
            raise RequestError(" ".join(faults))
        remarks = []
        for one in self.over:
            lacking = [name for name in self.strategies if not self._applies(one.key, name)]
            if lacking:
                why = "which is solved, not stepped" if _stepping(one.key) else "which has no such option"
                remarks.append(f"{one.key} is left out for {', '.join(lacking)}, {why}")
        for key in self._own():
            lacking = [name for name in self.strategies if not self._applies(key, name)]
            if lacking:
                remarks.append(f"{key} of the recipe is left out for {', '.join(lacking)}")
        return remarks

    def setting(self, values: Mapping[str, Any]) -> Setting:
        """The setting of some values, those left out that do not apply to its strategy.

        Raises:
            RequestError: values that the recipe refuses.
        """
        strategy = str(values.get("strategy", self.recipe.strategy))
        kept = {key: value for key, value in values.items() if self._applies(key, strategy)}
        document = self.recipe.model_dump(exclude_unset=True)
        for key in self._own():
            if not self._applies(key, strategy):
                section, _, name = key.partition(".")
                document[section] = {n: value for n, value in document[section].items() if n != name}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
        return Setting(kept, Recipe.make(changed(document, plain), axes.told(kept)), row_of(strategy).solved)

    def settings(self, combinations: Iterable[Mapping[str, Any]]) -> list[Setting]:
        """The settings of many combinations, each once."""
        found: dict[str, Setting] = {}
        for values in combinations:
            made = self.setting(values)
            found.setdefault(made.key, made)
        return list(found.values())

    def needs(self, key: str, values: Mapping[str, Any]) -> bool:
        """Whether a key applies to what was chosen for the others so far."""
        return self._applies(key, str(values.get("strategy", self.recipe.strategy)))

    # ------------------------------------------------------------------ keys

    def _own(self) -> list[str]:
        """The options and step settings that the recipe itself says."""
        options = [f"options.{name}" for name in self.recipe.options]
        return options + [f"train.{name}" for name in STEPS if name in self.recipe.train]

    def _names(self, strategy: str) -> set[str]:
        return row_of(strategy).names() | field_names(task_class(self.recipe.task))

    def _applies(self, key: str, strategy: str) -> bool:
        """Whether a strategy takes a key.

        Where strategies are compared, the ones that are solved are, whatever steps the others take.
        """
        section, _, name = key.partition(".")
        if section == "options":
            return name in self._names(strategy)
        stepped = any(not row_of(other).solved for other in self.strategies)
        return not (stepped and row_of(strategy).solved and _stepping(key))

    def _fault(self, one: Axis) -> str:
        """What is wrong with a key; empty where nothing is."""
        section, dot, name = one.key.partition(".")
        where = f"over {one.key}"
        if section == "seed":
            return message("seeds are no axis", where=where, remedy="Say --seeds 3, or --seeds 0,7,9.")
        if section in ("output", "merge"):
            return message(f"{section!r} is the sweep's own affair", where=where, remedy="Say --output for all of it.")
        if section in FIXED:
            what = "settings over different rows or tasks cannot be compared"
            return message(what, where=where, remedy="Sweep each of them.")
        if section not in Recipe.model_fields:
            right = KEY_ALIASES.get(section) or next(
                (f"options.{n}" for n in (ALIASES.get(section, section),) if self._option(n)), None
            )
            known = [*Recipe.model_fields, *([] if dot else self._known())]
            remedy = f"The key is {right!r}." if right else nearest(section, known)
            return message(f"unknown key {one.key!r}", where="over", remedy=remedy)
        if section in ("options", "train", "load", "processor") and not (dot and name):
            return message(f"{section!r} has keys of its own", where=where, expected=f"{section}.NAME")
        if section not in ("options", "train", "load", "processor") and dot:
            return message(f"{section!r} has no keys of its own", where=where)
        if section == "options" and not self._option(name):
            right = ALIASES.get(name, "")
            options = set().union(*map(self._names, self.strategies))
            remedy = f"The name here is {right!r}." if right in options else nearest(name, options)
            what = f"no option {name!r} of strategy {' or '.join(map(repr, self.strategies))}, nor of the task"
            return message(what, where=where, remedy=remedy)
        if section == "strategy":
            try:
                for value in one.values:
                    row_of(str(value))
            except RequestError as fault:
                return str(fault)
            if one.ranges:
                return message("strategies have no range", where=where)
        return ""

    def _option(self, name: str) -> bool:
        try:
            return any(name in self._names(strategy) for strategy in self.strategies)
        except RequestError:  # a strategy's name, which is said by itself
            return True

    def _known(self) -> list[str]:
        return sorted(f"options.{name}" for strategy in self.strategies for name in self._names(strategy))


def _stepping(key: str) -> bool:
    section, _, name = key.partition(".")
    return section == "train" and name in STEPS


def chosen_seeds(seeds: int | Sequence[int], first: int) -> list[int]:
    """The seeds: a number of them from the recipe's own on, or a list.

    Raises:
        RequestError: none, or one twice.
    """
    found = list(range(first, first + seeds)) if isinstance(seeds, int) else list(seeds)
    if not found or len(set(found)) < len(found):
        raise RequestError(
            message("no seeds to train with", where="seeds", expected="a number > 0, or different seeds", found=seeds)
        )
    return found


# ---------------------------------------------------------------------- results


def key_of(recipe: Recipe, identity: Mapping[str, str]) -> str:
    """What a trial is known by: a digest over all that its result depends on.

    Names of files and folders do not count; what is in them does.

    Args:
        recipe: with its seed.
        identity: digests of the rows of every part, and of the backbone.
    """
    beside = {"model", "data", "streaming", "columns", "output", "validation", "test", "limit", "split_seed", "merge"}
    said = recipe.model_dump(exclude=beside)
    said["labels"] = list(said["labels"] or ())
    text = json.dumps({"recipe": said, **identity, "format": FORMAT}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a trial; None where it has none yet.

    Raises:
        FolderError: a file that is no result.
    """
    file = folder / RESULT
    if not file.is_file():
        return None
    document = shards.read_json(file, MAX_RESULT)
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FolderError(message("not a trial's result", where=str(file), remedy="Delete this folder."))
    return document


def write_atomically(file: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, in place of whatever was there before."""
    stage = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
    try:
        shards.write_text(stage, text)
        os.replace(stage, file)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write a trial's result."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"format": FORMAT, **result}
    write_atomically(folder / RESULT, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
