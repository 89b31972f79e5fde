"""Many settings over one backbone, one after another, side by side in one table: `Sweep(...)`, and `.run()`.

Rows are read, divided and prepared once; the backbone is opened once, and every trial gives it back as it was. All
choices are made on the validation rows; the test rows are looked at once, at the end, for the rows of the table.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters import axes, trials
from adapters.campaign import BEST, FILE, Campaign, Terms
from adapters.errors import RequestError, message, nearest
from adapters.recipe import Recipe, changed
from adapters.search import Kind
from adapters.trials import Space
from adapters.yamltext import parse_yaml

logger = logging.getLogger(__name__)

MARK: Final = "# adapters sweep"
Say = Callable[[str], None]


@final
class Sweep(BaseModel):
    """What is varied over one recipe, as data; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    recipe: Recipe = Field(description="what all trials have in common")
    over: dict[str, Any] = Field(
        default_factory=dict,
        description="recipe key -> its values, or a range: strategy, options.r, train.learning_rate",
    )
    seeds: int | list[int] = Field(1, description="how many, from the recipe's own on, or which")
    search: Kind = Field("grid", description="grid, random or optuna")
    trials: int | None = Field(None, gt=0, description="how many settings random or optuna try")
    limit: int | None = Field(None, gt=0, description="the most trials; of a larger grid so many are drawn")
    metric: str | None = Field(None, description="what chooses, on the validation rows; left out: the task's own")
    seed: int = Field(0, description="of what is drawn: settings, not training")
    split_by_seed: bool = Field(False, description="each seed divides the rows anew, too")
    keep: str = Field("best", pattern="^(best|all)$", description="which adapters stay when all is done: best or all")
    output: str = Field("out/sweep", description="folder of results, table, picture and the best adapter")

    @classmethod
    def make(cls, document: Mapping[str, Any], where: str = "sweep") -> Sweep:
        """A sweep from plain data; its recipe may be the name of a file, and needs no output of its own.

        Raises:
            RequestError: every fault of the document, with the right names.
        """
        given = dict(document)
        output = str(given.get("output", cls.model_fields["output"].default))
        inner = given.get("recipe")
        if isinstance(inner, str):
            inner = _document(Path(inner))
        if isinstance(inner, Mapping):
            given["recipe"] = Recipe.make({"output": str(Path(output) / BEST), **inner}, f"{where}: recipe")
        try:
            made = cls(**given)
        except ValidationError as fault:
            raise RequestError(
                f"{where}: " + "; ".join(dict.fromkeys(_line(error, cls) for error in fault.errors()))
            ) from fault
        made.space()
        return made

    @classmethod
    def read(
        cls,
        file: str | Path,
        over: Mapping[str, Any] | None = None,
        changes: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> Sweep:
        """A sweep from a YAML file, of a sweep or of a recipe alone.

        Args:
            file: the YAML file.
            over: what varies, beside or in place of what the file says.
            changes: "key" or "section.key" of the recipe -> value, as in `Recipe.read`.
            **others: further keys of the sweep; None leaves the file's.

        Raises:
            RequestError: no such file, or anything in it that cannot be.
        """
        path = Path(file)
        document = _document(path)
        if not {"recipe", "over"} & set(document):
            document = {"recipe": document}
        inner = document.get("recipe")
        if isinstance(inner, str):
            inner = _document(path.parent / inner)
        if isinstance(inner, dict):
            document["recipe"] = changed(inner, changes or {})
        document["over"] = {**(document.get("over") or {}), **(over or {})}
        document |= {name: value for name, value in others.items() if value is not None}
        return cls.make(document, str(path))

    def space(self) -> Space:
        """What its settings are made of.

        Raises:
            RequestError: every key of `over` that does not exist, has no values, or cannot be compared.
        """
        made = Space(self.recipe, tuple(axes.axis(key, given) for key, given in self.over.items()))
        made.check()
        return made

    def run(self, say: Say | None = None, *, retry: bool = False, onward: str = "sweep.run()") -> dict[str, Any]:
        """Try everything that was not tried yet, test, and write table, picture and the best adapter.

        What a folder has results of is not tried again: an interrupted sweep goes on where it was, a widened one tries
        what is new. Ctrl-C leaves everything whole.

        Args:
            say: takes one line of progress at a time; None logs it.
            retry: trials that failed are tried again.
            onward: how to go on, said where a signal stops it.

        Returns:
            What stands in sweep.json: the table, the Pareto front, the setting to take, the sentence on the probe.

        Raises:
            RequestError: what was asked for cannot be, or every trial failed.
            FolderError: the output holds something else, or another process writes there.
            DiskError: the disk refuses.
        """
        from adapters import locks, places

        output = Path(self.output).expanduser()
        file = output / FILE

        def ours(_: object) -> bool:
            return file.is_file() and file.read_text(errors="replace").startswith(MARK)

        places.refuse_taken(output, ours, "a new folder, or one with a sweep of ours")
        with locks.held(output.with_name(f".{output.name}.lock"), str(output)):
            return Campaign(self._terms(), output, say or logger.info, retry=retry, onward=onward).whole()

    def _terms(self) -> Terms:
        import yaml

        document = self.model_dump(exclude_defaults=True)
        document["recipe"] = self.recipe.model_dump(exclude_defaults=True) | {"output": self.recipe.output}
        plain = json.loads(json.dumps({**document, "output": self.output}))
        return Terms(
            space=self.space(),
            seeds=tuple(trials.chosen_seeds(self.seeds, self.recipe.seed)),
            search=self.search,
            trials=self.trials,
            limit=self.limit,
            metric=self.metric,
            seed=self.seed,
            split_by_seed=self.split_by_seed,
            keep=self.keep,
            text=f"{MARK}\n{yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)}",
        )


def _document(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RequestError(message("there is no such file", where=str(path), expected="a sweep or a recipe in YAML"))
    try:
        document = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as fault:
        raise RequestError(message("not utf-8 text", where=str(path), found=fault)) from fault
    if not isinstance(document, dict):
        raise RequestError(message("not a sweep", where=str(path), expected="keys and values"))
    return document


def _line(error: Mapping[str, Any], cls: type[Sweep]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        inner = f"It belongs to the recipe: recipe.{path}." if path in Recipe.model_fields else ""
        return message(f"unknown key {path!r}", remedy=inner or nearest(path, cls.model_fields))
    if error["type"] == "missing":
        return message(f"the key {path!r} is missing", expected=cls.model_fields[path].description or "")
    if path.startswith("seeds"):
        expected = "how many (3), or which ([0, 7, 9])"
        return message("a wrong value", where="seeds", expected=expected, found=repr(error["input"]))
    return f"{path}: {error['msg']}" if path else str(error["msg"])
